// What is asked of logits, where they are: log-sum-exp, argmax, a target, a sample, the likeliest.

/// Logits that one block reduces.
const u32 VOCAB_CHUNK = 4096;

/// A value with its place; the greater value wins, the lower place on ties.
struct Best {
    float value;
    u32 at;
};
__device__ __forceinline__ bool beats(Best a, Best b) {
    return a.value > b.value || (a.value == b.value && a.at < b.at);
}
/// The best of a block of whole warps; every thread gets it. `shared` holds 32.
__device__ __forceinline__ Best block_best(Best best, Best* shared) {
    for (int d = 16; d > 0; d >>= 1) {
        Best other;
        other.value = __shfl_xor_sync(ALL_LANES, best.value, d);
        other.at = __shfl_xor_sync(ALL_LANES, best.at, d);
        if (beats(other, best)) best = other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
    __syncthreads();
    best = shared[0];
    for (u32 w = 1; w < blockDim.x / 32; w++) {
        if (beats(shared[w], best)) best = shared[w];
    }
    return best;
}

/// One chunk of a row: block `(chunk, row)`. `parts[row][chunk]` gets maximum, place, and the sum of
/// `exp(logit - maximum)`. NaN never is the maximum, but makes the sum NaN.
KERNEL(256, vocab_part, const float* logits, u32 vocab, float* parts) {
    __shared__ Best bests[32];
    __shared__ float sums[32];
    const float* row = logits + (u64)blockIdx.y * vocab;
    u32 start = blockIdx.x * VOCAB_CHUNK;
    u32 end = start + VOCAB_CHUNK < vocab ? start + VOCAB_CHUNK : vocab;
    Best best = {minus_infinity(), 0xffffffffu};
    for (u32 i = start + threadIdx.x; i < end; i += blockDim.x) {
        Best other = {row[i], i};
        if (beats(other, best)) best = other;
    }
    best = block_best(best, bests);
    float shift = best.value == minus_infinity() ? 0.f : best.value, sum = 0.f;
    for (u32 i = start + threadIdx.x; i < end; i += blockDim.x) sum += expf(row[i] - shift);
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        float* to = parts + ((u64)blockIdx.y * gridDim.x + blockIdx.x) * 3;
        to[0] = best.value;
        to[1] = __uint_as_float(best.at);
        to[2] = sum;
    }
}

/// Joins a row's chunks in order, one thread a row: `found[row]` gets the argmax, its logit, the
/// log-sum-exp and the target's logit (NaN without a target, 0xffffffff, or for one that is not here).
/// A row's logits are those of the tokens from `start` on.
KERNEL(32, vocab_join, const float* parts, u32 chunks, const float* logits, u32 start, u32 vocab,
       const u32* targets, u32 rows, float* found) {
    u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const float* p = parts + (u64)row * chunks * 3;
    Best best = {minus_infinity(), 0};
    for (u32 c = 0; c < chunks; c++) {
        if (p[3 * c] > best.value) {
            best.value = p[3 * c];
            best.at = __float_as_uint(p[3 * c + 1]);
        }
    }
    float sum = 0.f;
    for (u32 c = 0; c < chunks; c++) {
        float max = p[3 * c], part = p[3 * c + 2];
        // A chunk without a maximum adds nothing, or NaN if it holds one.
        sum += max == minus_infinity() || max == best.value ? part : part * expf(max - best.value);
    }
    found[4 * row] = __uint_as_float(best.at + start);
    found[4 * row + 1] = best.value;
    found[4 * row + 2] = best.value + logf(sum);
    // A target below `start` wraps around, past any vocabulary, and so does none.
    u32 target = targets[row] - start;
    found[4 * row + 3] =
        target < vocab ? logits[(u64)row * vocab + target] : float_from_bits(0x7fc00000u);
}

/// The `n` largest logits of a row, largest first, lowest id first among equals: one block a row of
/// `rows`, `top[i][n]` pairs of id and logit. Row `rows[2 * i]`, of which `rows[2 * i + 1]` are wanted.
KERNEL(256, top_tokens, const float* logits, u32 vocab, const u32* rows, u32 n, float* top) {
    __shared__ Best bests[32];
    const float* row = logits + (u64)rows[2 * blockIdx.x] * vocab;
    u32 wanted = rows[2 * blockIdx.x + 1];
    Best last = {float_from_bits(0x7f800000u), 0};
    for (u32 k = 0; k < wanted; k++) {
        Best best = {minus_infinity(), 0xffffffffu};
        for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
            Best other = {row[i], i};
            bool left = k == 0 || beats(last, other);
            if (left && beats(other, best)) best = other;
        }
        last = block_best(best, bests);
        if (threadIdx.x == 0) {
            float* to = top + ((u64)blockIdx.x * n + k) * 2;
            to[0] = __uint_as_float(last.at);
            to[1] = last.value;
        }
    }
}

/// How one row is sampled; see engine/src/core/sampling.rs, whose order of operations this keeps.
struct SampleArgs {
    u64 seed, position;
    float temperature, top_p, min_p;
    u32 top_k, row, penalties, first_penalty;
};

__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
/// A number in [0, 1) that depends on nothing but its key.
__device__ __forceinline__ double uniform(u64 seed, u64 position) {
    u64 bits = mix(mix(seed + 0x9e3779b97f4a7c15ull) ^ position * 0xd1342543de82ef95ull);
    return (double)(bits >> 11) / 9007199254740992.0;
}

/// Weights are summed as integers, so that no order of additions can change a draw: `e^w` in units
/// of 2^-44, of which 2^19 tokens fit 64 bits.
__device__ __forceinline__ u64 mass(float w) {
    return w < -31.f ? 0 : (u64)(exp((double)w) * 17592186044416.0 + 0.5);
}

/// A total order of candidates, likeliest greatest: the weight, then the lowest id.
__device__ __forceinline__ u64 sort_key(float w, u32 id) {
    u32 bits = __float_as_uint(w);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (0xffffffffu - id);
}

const u32 SAMPLE_THREADS = 512;

/// The greatest key such that the candidates (keys at least `floor`) from it upwards come to
/// `wanted`, counted or weighed; `floor` if they never do. Radix select, eight bits a pass.
__device__ u64 select_key(const float* w, u32 vocab, u64 floor, bool weigh, u64 wanted,
                          u64* histogram, u64* shared) {
    u64 prefix = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (u32 i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
            u64 key = sort_key(w[i], i);
            bool same = shift == 56 || key >> (shift + 8) == prefix >> (shift + 8);
            if (key < floor || !same) continue;
            u64 amount = weigh ? mass(w[i]) : 1;
            if (amount) atomicAdd(&histogram[key >> shift & 255], amount);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u64 left = wanted;
            int digit = 255;
            while (digit > 0 && histogram[digit] < left) left -= histogram[digit--];
            shared[0] = prefix | (u64)digit << shift;
            shared[1] = left;
        }
        __syncthreads();
        prefix = shared[0];
        wanted = shared[1];
        __syncthreads();
    }
    return prefix < floor ? floor : prefix;
}

/// Sum of integers over the block; every thread gets it.
__device__ u64 block_total(u64 x, u64* shared) {
    __syncthreads();
    if (threadIdx.x == 0) shared[0] = 0;
    __syncthreads();
    if (x) atomicAdd(&shared[0], x);
    __syncthreads();
    u64 total = shared[0];
    __syncthreads();
    return total;
}

/// Draws one token a block. `work[i][vocab]` holds the penalised logits, then weights relative to
/// the likeliest; `penalties` are pairs of a token and what is taken from its logit. `sampled[i]` gets
/// the token and its logit as the model gave it.
KERNEL(512, sample_tokens, const float* logits, u32 vocab, const SampleArgs* args,
       const float* penalties, float* work, u32* sampled) {
    __shared__ Best bests[32];
    __shared__ u64 histogram[256];
    __shared__ u64 shared[2];
    __shared__ u64 sums[SAMPLE_THREADS];
    SampleArgs a = args[blockIdx.x];
    const float* row = logits + (u64)a.row * vocab;
    float* w = work + (u64)blockIdx.x * vocab;
    u32 t = threadIdx.x;
    for (u32 i = t; i < vocab; i += blockDim.x) w[i] = row[i];
    __syncthreads();
    for (u32 i = t; i < a.penalties; i += blockDim.x) {
        const float* p = penalties + 2 * (a.first_penalty + i);
        u32 token = __float_as_uint(p[0]);
        if (token < vocab) w[token] -= p[1];
    }
    __syncthreads();
    Best best = {minus_infinity(), 0xffffffffu};
    for (u32 i = t; i < vocab; i += blockDim.x) {
        Best other = {w[i], i};
        if (beats(other, best)) best = other;
    }
    best = block_best(best, bests);
    bool finite = best.value > minus_infinity() && best.value < float_from_bits(0x7f800000u);
    if (a.temperature == 0.f || !finite) {
        if (t == 0) {
            u32 token = best.at == 0xffffffffu ? 0 : best.at;
            sampled[2 * blockIdx.x] = token;
            sampled[2 * blockIdx.x + 1] = __float_as_uint(row[token]);
        }
        return;
    }
    for (u32 i = t; i < vocab; i += blockDim.x) w[i] = (w[i] - best.value) / a.temperature;
    __syncthreads();
    u64 floor = 0;
    if (a.min_p > 0.f) floor = sort_key(logf(a.min_p), 0xffffffffu);
    if (a.top_k > 0 && a.top_k < vocab) {
        floor = select_key(w, vocab, floor, false, a.top_k, histogram, shared);
    }
    if (a.top_p < 1.f) {
        u64 total = 0;
        for (u32 i = t; i < vocab; i += blockDim.x) {
            if (sort_key(w[i], i) >= floor) total += mass(w[i]);
        }
        total = block_total(total, shared);
        u64 wanted = (u64)((double)total * (double)a.top_p);
        floor = select_key(w, vocab, floor, true, wanted ? wanted : 1, histogram, shared);
    }
    // Inverts the cumulative distribution in ascending id: a thread a stretch.
    u32 length = (vocab + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    u32 begin = t * length < vocab ? t * length : vocab;
    u32 end = begin + length < vocab ? begin + length : vocab;
    u64 sum = 0;
    for (u32 i = begin; i < end; i++) {
        if (sort_key(w[i], i) >= floor) sum += mass(w[i]);
    }
    sums[t] = sum;
    u64 total = block_total(sum, shared);
    u64 target = (u64)(uniform(a.seed, a.position) * (double)total);
    if (target >= total) target = total - 1;
    u64 before = 0;
    for (u32 i = 0; i < t; i++) before += sums[i];
    if (before > target || before + sum <= target) return;
    for (u32 i = begin; i < end; i++) {
        if (sort_key(w[i], i) < floor) continue;
        before += mass(w[i]);
        if (before > target) {
            sampled[2 * blockIdx.x] = i;
            sampled[2 * blockIdx.x + 1] = __float_as_uint(row[i]);
            return;
        }
    }
}

/// `tokens[pairs[2 * i]] = kept[pairs[2 * i + 1]]`; what is no token becomes 0.
KERNEL(128, take_tokens, u32* tokens, const u32* pairs, u32 count, const u32* kept, u32 vocab) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    u32 token = kept[pairs[2 * i + 1]];
    tokens[pairs[2 * i]] = token < vocab ? token : 0;
}

/// Keeps chosen tokens: entry `i` of `list` names its place, where the token is, and whether that is
/// a place in `sampled` or a row of `found`. There each of `ranks` has facts of its part of the
/// vocabulary, `[ranks][rows]`; later ranks hold higher ids, so only a greater logit wins.
KERNEL(128, keep_tokens, const u32* list, u32 count, const float* found, u32 ranks, u32 rows,
       const u32* sampled, u32* kept) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    u32 place = list[3 * i], at = list[3 * i + 1], drawn = list[3 * i + 2];
    if (drawn) {
        kept[place] = sampled[2 * at];
        return;
    }
    const float* best = found + 4 * (u64)at;
    for (u32 r = 1; r < ranks; r++) {
        const float* other = found + 4 * ((u64)r * rows + at);
        if (other[1] > best[1]) best = other;
    }
    kept[place] = __float_as_uint(best[0]);
}
