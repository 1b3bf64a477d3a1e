// A point in the work of a stream that another stream can wait for.
#ifndef KRAIT_KERNELS_EVENT_H_
#define KRAIT_KERNELS_EVENT_H_

#include "kernels/context.h"

namespace krait {

// On the CPU, where ops are done when they return, everything here only tells the EnqueueOrder of
// its context; while planning it does nothing.
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
  int side_ = 0;           // of the mark
  int64_t traffic_ = 0;    // before it, see EnqueueOrder
};

// A stream beside that of a context, for work that may run under other work. `side`, from 1 on, is
// the same number on all ranks that do the same work on it.
class SideStream {
 public:
  explicit SideStream(int side) : side_(side) {}
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  // `ctx` on this stream, behind all that is enqueued on ctx.stream so far. What is done there is
  // not profiled: it runs beside what is. Memory that it uses and ctx.scratch gives back must not
  // be given back before Join().
  Context Behind(const Context& ctx);
  // What is enqueued on ctx.stream from here on waits for all that was enqueued on this stream
  // since the last Join().
  void Join(const Context& ctx);

 private:
  friend class SideStreamDelay;
  static void (*delay)(void* stream);  // enqueued first by each Behind(), where not null

  const int side_;
  void* stream_ = nullptr;  // cudaStream_t, made by the first Behind() on CUDA; urgent
  bool used_ = false;       // since the last Join
  Event before_, after_;
};

// For tests: while it exists, all work of side streams comes late, so that a missing Join() shows.
class SideStreamDelay {
 public:
  explicit SideStreamDelay(void (*delay)(void* stream)) { SideStream::delay = delay; }
  ~SideStreamDelay() { SideStream::delay = nullptr; }
  SideStreamDelay(const SideStreamDelay&) = delete;
  SideStreamDelay& operator=(const SideStreamDelay&) = delete;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_EVENT_H_
