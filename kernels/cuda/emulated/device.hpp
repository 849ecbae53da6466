// The other body of prelude.cuh: kernels as host code, for tests on machines without a GPU.
//
// A block's threads are fibers on one OS thread, switched at barriers and warp operations only, in
// an order that differs from block to block. So a missing barrier, a lane that does not take part in
// a warp operation, an asynchronous copy that is not waited for (it happens at the wait, no earlier)
// or a read past a buffer (a guard page follows each) shows. What it cannot show: speed, memory
// ordering between warps without a barrier, and whether the PTX in prelude.cuh says the same.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/// A global that is never destroyed: threads of a process that ends still call the driver.
template <class T> T& kept() { return *new T; }

struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct Dim {
    u32 x, y, z;
};

namespace emulated {

/// What a lane shows its warp: up to 40 bytes a lane, two operations deep.
struct Warp {
    u8 shown[2][32][48];
};
struct Copy {
    void* to;
    const void* from;
    bool valid;
    u32 group;
};
enum class State { Ready, AtWarp, AtBlock, Done };
struct Fiber {
    void* stack_pointer = nullptr;
    State state = State::Done;
    Dim thread{};
    Warp* warp = nullptr;
    u32 lane = 0, operations = 0, groups = 0;
    std::vector<Copy> copies;
};

extern Fiber* self;
extern Dim block, block_size, grid_size;
extern u8* dynamic_shared;

/// Gives way to the other threads until this one's wait is over.
void wait(State state);
[[noreturn]] void fail(const char* what);

inline void aligned(const void* p, size_t size) {
    if ((uintptr_t)p % size) fail("a vector access that is not aligned");
}

/// Shows the warp `value` and looks at all lanes' values.
template <class T> const u8 (*show(const T& value))[48] {
    static_assert(sizeof(T) <= 48, "too much for one lane to show");
    auto& shown = self->warp->shown[self->operations++ % 2];
    memcpy(shown[self->lane], &value, sizeof(T));
    wait(State::AtWarp);
    return shown;
}
template <class T> T shown_by(const u8 (*shown)[48], u32 lane) {
    T value;
    memcpy(&value, shown[lane], sizeof(T));
    return value;
}

/// A kernel by name, callable with an array of pointers to its arguments, as a driver calls it.
struct Kernel {
    std::vector<size_t> sizes;
    std::function<void(void**)> call;
    template <class... A> Kernel(const char* name, void (*f)(A...)) {
        sizes = {sizeof(A)...};
        call = [f](void** args) { invoke(f, args, std::index_sequence_for<A...>()); };
        add(name, *this);
    }
    template <class... A, size_t... I>
    static void invoke(void (*f)(A...), void** args, std::index_sequence<I...>) {
        f(*(A*)args[I]...);
    }
    static void add(const char* name, const Kernel& kernel);
    static const Kernel* find(const std::string& name);
};

} // namespace emulated

#define threadIdx (emulated::self->thread)
#define blockIdx (emulated::block)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)
#define __device__
#define __forceinline__ inline
#define __align__(n) alignas(n)
// Blocks run one after another, so what a block shares may be static.
#define __shared__ static
#define DYNAMIC_SHARED(name) u8* name = emulated::dynamic_shared
#define KERNEL(threads, name, ...)                                                                 \
    static void name(__VA_ARGS__);                                                                 \
    static emulated::Kernel kernel_##name(#name, name);                                            \
    static void name(__VA_ARGS__)
#define CROWDED_KERNEL(threads, blocks, name, ...) KERNEL(threads, name, __VA_ARGS__)

inline void __syncthreads() { emulated::wait(emulated::State::AtBlock); }
template <class T> T __shfl_xor_sync(u32, T value, int lanes) {
    return emulated::shown_by<T>(emulated::show(value), emulated::self->lane ^ lanes);
}
template <class T> T atomicAdd(T* p, T x) {
    T before = *p;
    *p += x;
    return before;
}
inline float __uint_as_float(u32 x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline u32 __float_as_uint(float x) {
    u32 u;
    memcpy(&u, &x, 4);
    return u;
}

template <class T> T loaded(const void* p) {
    emulated::aligned(p, sizeof(T));
    T v;
    memcpy(&v, p, sizeof(T));
    return v;
}
inline uint4 load16(const void* p) { return loaded<uint4>(p); }
inline uint2 load8(const void* p) { return loaded<uint2>(p); }
inline u32 load4(const void* p) { return loaded<u32>(p); }

/// Round to nearest even; NaN stays NaN.
inline u16 rounded_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 pack_bf16(float lo, float hi) { return rounded_bf16(lo) | (u32)rounded_bf16(hi) << 16; }
inline float half_to_float(u16 h) {
    u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    float f = (float)fraction * 5.9604644775390625e-8f; // 2^-24
    return sign ? -f : f;
}
inline float exp2_fast(float x) { return exp2f(x); }

inline void copy_async16(void* to, const void* from, bool valid) {
    emulated::aligned(to, 16);
    if (valid) emulated::aligned(from, 16);
    emulated::self->copies.push_back({to, from, valid, emulated::self->groups});
}
inline void copy_async_commit() { emulated::self->groups++; }
template <int N> void copy_async_wait() {
    auto& fiber = *emulated::self;
    std::vector<emulated::Copy> left;
    for (auto& c : fiber.copies) {
        if (c.group + N >= fiber.groups) {
            left.push_back(c);
        } else if (c.valid) {
            memcpy(c.to, c.from, 16);
        } else {
            memset(c.to, 0, 16);
        }
    }
    fiber.copies.swap(left);
}

/// Lane `l` gets elements `2 * (l % 4)` and the next one of row `l / 4` of each matrix; transposed:
/// of column `l / 4`.
inline void load_matrices_as(u32 (&r)[4], const void* row, bool transposed) {
    emulated::aligned(row, 16);
    auto rows = emulated::show(row);
    u32 lane = emulated::self->lane;
    for (u32 m = 0; m < 4; m++) {
        u16 pair[2];
        for (u32 i = 0; i < 2; i++) {
            u32 line = lane / 4, column = lane % 4 * 2 + i;
            if (transposed) std::swap(line, column);
            pair[i] = emulated::shown_by<const u16*>(rows, m * 8 + line)[column];
        }
        r[m] = pair[0] | (u32)pair[1] << 16;
    }
}
inline void load_matrices(u32 (&r)[4], const void* row) { load_matrices_as(r, row, false); }
inline void load_matrices_transposed(u32 (&r)[4], const void* row) { load_matrices_as(r, row, true); }

/// The fragments are those of the PTX ISA, section "Matrix Fragments for mma.m16n8k16".
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Operands {
        u32 a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    auto all = emulated::show(mine);
    auto element = [](u32 pair, u32 i) { return __uint_as_float(pair >> (16 * i) << 16); };
    u32 lane = emulated::self->lane;
    for (u32 i = 0; i < 4; i++) {
        u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0.f;
        for (u32 k = 0; k < 16; k++) {
            auto x = emulated::shown_by<Operands>(all, row % 8 * 4 + k % 8 / 2);
            auto y = emulated::shown_by<Operands>(all, column * 4 + k % 8 / 2);
            sum += element(x.a[row / 8 + k / 8 * 2], k % 2) * element(y.b[k / 8], k % 2);
        }
        d[i] += sum;
    }
}
