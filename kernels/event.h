// A point in the work of a stream that another stream can wait for.
#ifndef KRAIT_KERNELS_EVENT_H_
#define KRAIT_KERNELS_EVENT_H_

#include "kernels/context.h"

namespace krait {

// On the CPU, where ops are done when they return, everything here does nothing; so it does while
// planning.
class Event {
 public:
  Event() = default;
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // Marks the end of what has been enqueued on ctx.stream so far.
  void Record(const Context& ctx);
  // What is enqueued on ctx.stream from here on waits for the mark; the host does not wait. Without
  // a mark there is nothing to wait for.
  void Wait(const Context& ctx) const;

 private:
  void* event_ = nullptr;  // cudaEvent_t, made by the first Record() on CUDA
};

}  // namespace krait

#endif  // KRAIT_KERNELS_EVENT_H_
