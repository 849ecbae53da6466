// The parts of NCCL that this project calls, among ranks of one process or of several on one machine.
// A group is shared memory under the name in its unique id. A sum waits on each rank's stream until all
// ranks have come, then adds in the order of the ranks. Communicators are non-blocking: joining, and the
// first sum, are in progress for a while.
#include "streams.hpp"

#include <atomic>
#include <fcntl.h>
#include <memory>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

using namespace emulated;

#define API extern "C" __attribute__((visibility("default"))) int

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { UINT32 = 3, FLOAT32 = 7, SUM = 0 };

struct UniqueId {
    char internal[128];
};
/// `ncclConfig_t` as of 2.14.
struct Config {
    size_t size;
    u32 magic, version;
    int blocking;
};
static const int RANKS_MAX = 16;
/// Values that a sum has at most.
static const size_t COUNT_MAX = 8 << 20;

/// What all processes see of a rank. Fresh shared memory is zero.
struct Slot {
    /// The process and the device; 0: nobody has come.
    std::atomic<u64> owner;
    /// Sums to which it has given its part, and those that it has taken.
    std::atomic<u64> given, taken;
    u64 count;
};
struct Group {
    std::atomic<u32> joined, refused;
    Slot slots[RANKS_MAX];
    u32 parts[RANKS_MAX][COUNT_MAX];
};
/// A rank's end; sums on streams keep it.
struct End {
    Group* group;
    int ranks, rank, device;
    std::atomic<bool> aborted{false};
    bool connected = false;
    int polls_to_connect = 0;
    /// Recordings that have a sum of it hold this too.
    std::shared_ptr<int> recordings = std::make_shared<int>();
    std::string name;
    ~End() {
        // A group that never was complete.
        if ((int)group->joined < ranks) shm_unlink(name.c_str());
        munmap(group, sizeof(Group));
    }

    int state() const {
        if (group->refused) return INVALID_USAGE;
        return (int)group->joined < ranks || polls_to_connect ? IN_PROGRESS : SUCCESS;
    }
};
struct Comm {
    std::shared_ptr<End> end;
};

static thread_local int depth;
static thread_local std::vector<std::function<int()>> pending;
static thread_local std::vector<std::shared_ptr<End>> leaving;
static thread_local bool joins;

/// One rank's part of a sum of 32-bit values, on its stream.
template <class T>
static Work part_of_sum(std::shared_ptr<End> end, const T* from, T* to, size_t count,
                        std::shared_ptr<int> recording) {
    u64 sum = 0;
    return [=]() mutable {
        (void)recording;
        if (end->aborted) return true;
        Group& g = *end->group;
        Slot& mine = g.slots[end->rank];
        if (!sum) {
            u64 next = mine.given + 1;
            for (int r = 0; r < end->ranks; r++) {
                if (g.slots[r].taken + 1 < next) return false;
            }
            memcpy(g.parts[end->rank], from, count * sizeof(T));
            mine.count = count;
            mine.given = sum = next;
        }
        for (int r = 0; r < end->ranks; r++) {
            if (g.slots[r].given < sum) return false;
        }
        for (int r = 0; r < end->ranks; r++) {
            if (g.slots[r].count != count) fail("ranks that sum different counts");
        }
        for (size_t i = 0; i < count; i++) {
            T total = ((const T*)g.parts[0])[i];
            for (int r = 1; r < end->ranks; r++) total += ((const T*)g.parts[r])[i];
            to[i] = total;
        }
        mine.taken = sum;
        return true;
    };
}

API ncclGetUniqueId(UniqueId* id) {
    static std::atomic<u32> ids;
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/headstart-emulated-nccl-%d-%u-%lld-%ld", getpid(),
             (u32)ids++, (long long)now.tv_sec, now.tv_nsec);
    return SUCCESS;
}
API ncclCommInitRankConfig(void** comm, int ranks, UniqueId id, int rank, const Config* config) {
    if (ranks < 1 || ranks > RANKS_MAX || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
    if (config->magic != 0xcafebeef || config->version < 21400) return INVALID_ARGUMENT;
    if (config->size < offsetof(Config, blocking) + 4 || config->blocking != 0) return INVALID_ARGUMENT;
    int file = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
    if (file < 0) return SYSTEM_ERROR;
    void* map = MAP_FAILED;
    if (!ftruncate(file, sizeof(Group))) {
        map = mmap(nullptr, sizeof(Group), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    }
    close(file);
    if (map == MAP_FAILED) return SYSTEM_ERROR;
    auto end = std::make_shared<End>();
    end->group = (Group*)map;
    end->name = id.internal;
    end->ranks = ranks;
    end->rank = rank;
    end->device = current_device();
    Group& g = *end->group;
    // As NCCL: ranks have a GPU each. Those of different processes count as different ones.
    u64 owner = ((u64)getpid() << 8) + end->device + 1, nobody = 0;
    if (!g.slots[rank].owner.compare_exchange_strong(nobody, owner)) return INVALID_ARGUMENT;
    for (int r = 0; r < ranks; r++) {
        if (r != rank && g.slots[r].owner == owner) return g.refused = 1, INVALID_USAGE;
    }
    if ((int)++g.joined == ranks) shm_unlink(id.internal);
    *comm = new Comm{end};
    joins = depth;
    return IN_PROGRESS;
}
API ncclCommGetAsyncError(void* comm, int* state) {
    End& end = *((Comm*)comm)->end;
    *state = end.state();
    if (end.polls_to_connect) end.polls_to_connect--;
    return SUCCESS;
}
API ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, void* comm,
                  void* stream) {
    auto end = ((Comm*)comm)->end;
    bool known = (type == UINT32 || type == FLOAT32) && operation == SUM;
    if (!known || count > COUNT_MAX) return INVALID_ARGUMENT;
    if (end->device != current_device()) return INVALID_USAGE;
    if (end->state() == IN_PROGRESS) fail("a sum of a communicator that is still busy");
    auto recording = ((Stream*)stream)->capturing ? end->recordings : nullptr;
    Work work = type == FLOAT32
                    ? part_of_sum(end, (const float*)from, (float*)to, count, recording)
                    : part_of_sum(end, (const u32*)from, (u32*)to, count, recording);
    auto start = [=] {
        int before = set_current_device(end->device);
        int refused = enqueue(stream, work);
        set_current_device(before);
        if (refused) return INVALID_USAGE;
        if (end->connected) return SUCCESS;
        end->connected = true;
        end->polls_to_connect = 2;
        return IN_PROGRESS;
    };
    if (!depth) return start();
    return pending.push_back(start), SUCCESS;
}
/// Waits as NCCL does: recordings that use a communicator go before it, and so do their launches, whose
/// sums were given up.
static void wait_for_recordings() {
    auto ends = std::move(leaving);
    leaving.clear();
    wait_until("a communicator that waits in vain for recordings that use it", [&] {
        run_streams();
        for (auto& end : ends) {
            if (end->recordings.use_count() > 1) return false;
        }
        return true;
    });
}
API ncclCommAbort(void* comm) {
    auto made = (Comm*)comm;
    {
        std::lock_guard<std::recursive_mutex> hold(everything);
        made->end->aborted = true;
    }
    leaving.push_back(made->end);
    delete made;
    if (!depth) wait_for_recordings();
    return SUCCESS;
}
API ncclGroupStart() { return depth++, SUCCESS; }
API ncclGroupEnd() {
    if (!depth) return INVALID_USAGE;
    if (--depth) return SUCCESS;
    int result = joins ? IN_PROGRESS : SUCCESS;
    joins = false;
    for (auto& start : pending) {
        int started = start();
        if (started && (result == SUCCESS || result == IN_PROGRESS)) result = started;
    }
    pending.clear();
    if (!leaving.empty()) wait_for_recordings();
    return result;
}
extern "C" __attribute__((visibility("default"))) const char* ncclGetErrorString(int result) {
    static const char* texts[] = {"no error",         "unhandled cuda error", "unhandled system error",
                                  "internal error",   "invalid argument",     "invalid usage",
                                  "remote error",     "in progress"};
    return result >= 0 && result < 8 ? texts[result] : "unknown error";
}
