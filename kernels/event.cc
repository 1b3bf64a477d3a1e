#include "kernels/event.h"

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

}  // namespace krait
