#include "kernels/event.h"

#include <utility>

#include "kernels/cuda/runtime.h"

namespace krait {

Event::~Event() {
  if (event_ != nullptr) cuda::DestroyEvent(event_);
}

void Event::Record(const Context& ctx) {
  if (ctx.planning) return;
  side_ = ctx.side;
  traffic_ = ctx.order != nullptr ? ctx.order->Mark() : 0;
  if (ctx.device != Device::kCuda) return;
  if (event_ == nullptr) event_ = cuda::CreateEvent(/*timed=*/false);
  cuda::RecordEvent(event_, ctx.stream);
}

void Event::Wait(const Context& ctx) const {
  if (ctx.planning) return;
  if (ctx.order != nullptr && ctx.side == 0) ctx.order->WaitFor(side_, traffic_);
  if (event_ != nullptr) cuda::WaitForEvent(event_, ctx.stream);
}

void (*SideStream::delay)(void* stream) = nullptr;

SideStream::~SideStream() {
  if (stream_ != nullptr) cuda::DestroyStream(stream_);
}

Context SideStream::Behind(const Context& ctx) {
  Context side = ctx;
  if (ctx.planning) return side;
  side.side = side_;
  used_ = true;
  if (ctx.device != Device::kCuda) return side;
  if (stream_ == nullptr) stream_ = cuda::CreateStream(/*urgent=*/true);
  side.stream = stream_;
  side.profile = nullptr;
  before_.Record(ctx);
  before_.Wait(side);
  if (delay != nullptr) delay(stream_);
  return side;
}

void SideStream::Join(const Context& ctx) {
  if (!std::exchange(used_, false)) return;
  Context side = ctx;
  side.side = side_;
  side.stream = stream_;
  after_.Record(side);
  after_.Wait(ctx);
}

}  // namespace krait
