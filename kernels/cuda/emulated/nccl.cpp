// The parts of NCCL that this project calls, among ranks of one process. A sum waits on each rank's
// stream until all ranks have come, then adds in the order of the ranks.
#include "streams.hpp"

#include <map>
#include <memory>

using namespace emulated;

#define API extern "C" __attribute__((visibility("default"))) int

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5 };
enum { FLOAT32 = 7, SUM = 0 };

struct UniqueId {
    char internal[128];
};
struct Part {
    const float* from = nullptr;
    float* to = nullptr;
    size_t count = 0;
};
/// The ranks of one unique id.
struct Clique {
    std::vector<int> devices;
    std::vector<Part> parts;
    int joined = 0, arrived = 0;
    u64 rounds = 0;
    bool refused = false;
};
struct Comm {
    std::shared_ptr<Clique> clique;
    int rank;
};

static auto& cliques = kept<std::map<std::string, std::shared_ptr<Clique>>>();
static thread_local int depth;
static thread_local std::vector<Comm*> joining;
static thread_local std::vector<std::function<int()>> pending;

static int wait_for_ranks(Comm* comm) {
    wait_until("a rank that waits for others in vain", [=] {
        Clique& c = *comm->clique;
        return c.refused || c.joined == (int)c.devices.size();
    });
    return comm->clique->refused ? INVALID_USAGE : SUCCESS;
}

/// One rank's part of a sum, on its stream.
static Work part_of_sum(Comm* comm, Part part) {
    bool came = false;
    u64 round = 0;
    auto clique = comm->clique;
    int rank = comm->rank;
    return [=]() mutable {
        Clique& c = *clique;
        if (!came) {
            // A rank cannot come to the next sum before it left the last one.
            came = true;
            round = c.rounds;
            c.parts[rank] = part;
            if (++c.arrived == (int)c.parts.size()) {
                for (auto& p : c.parts) {
                    if (p.count != part.count) fail("ranks that sum different counts");
                }
                for (size_t i = 0; i < part.count; i++) {
                    float sum = c.parts[0].from[i];
                    for (size_t r = 1; r < c.parts.size(); r++) sum += c.parts[r].from[i];
                    for (auto& p : c.parts) p.to[i] = sum;
                }
                c.arrived = 0;
                c.rounds++;
            }
        }
        return c.rounds > round;
    };
}

API ncclGetUniqueId(UniqueId* id) {
    static u32 ids;
    std::lock_guard<std::recursive_mutex> hold(everything);
    memset(id, 0, sizeof *id);
    return snprintf(id->internal, sizeof id->internal, "emulated %u", ids++), SUCCESS;
}
API ncclCommInitRank(void** comm, int ranks, UniqueId id, int rank) {
    if (ranks < 1 || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
    std::unique_lock<std::recursive_mutex> hold(everything);
    auto& clique = cliques[std::string(id.internal, sizeof id.internal)];
    if (!clique) {
        clique = std::make_shared<Clique>();
        clique->devices.assign(ranks, -1);
        clique->parts.resize(ranks);
    }
    if ((int)clique->devices.size() != ranks || clique->devices[rank] >= 0) return INVALID_ARGUMENT;
    // As NCCL: ranks have a GPU each.
    for (int other : clique->devices) {
        if (other == current_device()) return clique->refused = true, INVALID_USAGE;
    }
    clique->devices[rank] = current_device();
    clique->joined++;
    auto made = new Comm{clique, rank};
    *comm = made;
    hold.unlock();
    if (depth) return joining.push_back(made), SUCCESS;
    return wait_for_ranks(made);
}
API ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, void* comm,
                  void* stream) {
    auto c = (Comm*)comm;
    if (type != FLOAT32 || operation != SUM) return INVALID_ARGUMENT;
    if (c->clique->devices[c->rank] != current_device()) return INVALID_USAGE;
    Work work = part_of_sum(c, {(const float*)from, (float*)to, count});
    if (!depth) return enqueue(stream, work) ? INVALID_USAGE : SUCCESS;
    int device = current_device();
    pending.push_back([=] {
        int before = set_current_device(device);
        int refused = enqueue(stream, work);
        set_current_device(before);
        return refused ? INVALID_USAGE : SUCCESS;
    });
    return SUCCESS;
}
API ncclGroupStart() { return depth++, SUCCESS; }
API ncclGroupEnd() {
    if (!depth) return INVALID_USAGE;
    if (--depth) return SUCCESS;
    int result = SUCCESS;
    for (auto comm : joining) result = result ? result : wait_for_ranks(comm);
    joining.clear();
    for (auto& work : pending) result = result ? result : work();
    pending.clear();
    return result;
}
API ncclCommDestroy(void* comm) { return delete (Comm*)comm, SUCCESS; }
extern "C" __attribute__((visibility("default"))) const char* ncclGetErrorString(int result) {
    static const char* texts[] = {"no error", "unhandled cuda error", "unhandled system error",
                                  "internal error", "invalid argument", "invalid usage"};
    return result >= 0 && result < 6 ? texts[result] : "unknown error";
}
