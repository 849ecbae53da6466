// Streams of the emulated driver, and memory that it gave out.
#pragma once
#include "device.hpp"

#include <deque>
#include <mutex>

namespace emulated {

/// Work on a stream: whether it is done. Work that waits for other streams is asked again.
typedef std::function<bool()> Work;

struct Graph {
    std::vector<Work> work;
};
struct Stream {
    int device;
    Graph* capturing = nullptr;
    std::deque<Work> queue;
    u64 done = 0;
    /// The device failed in work of this stream: the rest of it is lost, and all that wait for it learn.
    bool failed = false;
};

/// The device whose context the calling thread has made current; what it was before another is made.
int current_device();
int set_current_device(int device);

/// Has `work` done after what the stream has before it; captures it if the stream captures.
int enqueue(void* stream, Work work);

/// Does of all streams' work what can be done, for who holds `everything`.
void run_streams();

/// Waits until `over`, for streams or ranks of other threads, who learn of what it changed.
void wait_until(const char* what, std::function<bool()> over);

/// What `over` looks at, streams and ranks alike, is changed under this lock.
extern std::recursive_mutex& everything;

} // namespace emulated
