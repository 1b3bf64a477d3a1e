#include "kernels/event.h"

#include <utility>

#include "kernels/cuda/runtime.h"

namespace krait {

Event::~Event() {
  if (event_ != nullptr) cuda::DestroyEvent(event_);
}

void Event::Record(const Context& ctx) {
  if (ctx.device != Device::kCuda || ctx.planning) return;
  if (event_ == nullptr) event_ = cuda::CreateEvent(/*timed=*/false);
  cuda::RecordEvent(event_, ctx.stream);
}

void Event::Wait(const Context& ctx) const {
  if (event_ != nullptr && !ctx.planning) cuda::WaitForEvent(event_, ctx.stream);
}

void (*SideStream::delay)(void* stream) = nullptr;

SideStream::~SideStream() {
  if (stream_ != nullptr) cuda::DestroyStream(stream_);
}

Context SideStream::Behind(const Context& ctx) {
  Context side = ctx;
  if (ctx.device != Device::kCuda || ctx.planning) return side;
  if (stream_ == nullptr) stream_ = cuda::CreateStream(/*urgent=*/true);
  side.stream = stream_;
  side.side = side_;
  side.profile = nullptr;
  before_.Record(ctx);
  before_.Wait(side);
  if (delay != nullptr) delay(stream_);
  used_ = true;
  return side;
}

void SideStream::Join(const Context& ctx) {
  if (!std::exchange(used_, false)) return;
  Context side = ctx;
  side.stream = stream_;
  after_.Record(side);
  after_.Wait(ctx);
}

}  // namespace krait
