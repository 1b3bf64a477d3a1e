#include "data/read_ahead.h"

#include <algorithm>
#include <new>
#include <system_error>

#include "kernels/base/check.h"

namespace krait {
namespace {

// Where steps are short, the time of one does not cover a disk that is slow for a moment.
constexpr int64_t kAheadTokens = int64_t{128} << 10;

}  // namespace

int64_t ReadAhead::Batches(int64_t tokens) {
  return 1 + std::max<int64_t>(1, kAheadTokens / std::max<int64_t>(1, tokens));
}

ReadAhead::ReadAhead(const Dataset* data, const StepRows& rows, int64_t first, int64_t steps)
    : data_(data), rows_(rows), first_(first), steps_(steps) {
  const int64_t tokens = rows.passes * rows.rows * data->seq_len();
  slots_.resize(static_cast<size_t>(std::min(Batches(tokens), std::max<int64_t>(steps, 1))));
  for (Slot& slot : slots_) slot.batch.Resize(rows.passes * rows.rows, data->seq_len());
  try {
    thread_ = std::thread([this] { Read(); });
  } catch (const std::system_error&) {
    // Without a thread each step reads its own rows.
  }
}

ReadAhead::~ReadAhead() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

absl::Status ReadAhead::ReadInto(TokenBatch* batch, int64_t step) {
  try {
    return data_->ReadTraining(first_ + step * rows_.passes * rows_.stride, rows_.passes,
                               rows_.stride, rows_.rows, batch, &ending_);
  } catch (const std::bad_alloc&) {
    return Error(ExitCode::kOutOfMemory, "out of memory while reading data");
  }
}

void ReadAhead::Read() {
  const auto slots = static_cast<int64_t>(slots_.size());
  std::unique_lock lock(mutex_);
  while (read_ < steps_) {
    // The slot of the step that was taken last is in use.
    changed_.wait(lock,
                  [&] { return ending_ || read_ < std::max<int64_t>(taken_ - 1, 0) + slots; });
    if (ending_) return;
    Slot& slot = slots_[static_cast<size_t>(read_ % slots)];
    lock.unlock();
    slot.status = ReadInto(&slot.batch, read_);
    const bool failed = !slot.status.ok();
    lock.lock();
    ++read_;
    changed_.notify_all();
    if (failed) return;
  }
}

absl::StatusOr<const TokenBatch*> ReadAhead::Next() {
  KRAIT_CHECK(taken_ < steps_);
  std::unique_lock lock(mutex_);
  const auto slot_of = [&](int64_t step) -> Slot& {
    return slots_[static_cast<size_t>(step % static_cast<int64_t>(slots_.size()))];
  };
  // After an error nothing more is read.
  if (taken_ > 0 && !slot_of(taken_ - 1).status.ok()) return slot_of(taken_ - 1).status;
  Slot& slot = slot_of(taken_++);
  if (thread_.joinable()) {
    changed_.notify_all();
    changed_.wait(lock, [&] { return read_ >= taken_; });
  } else {
    slot.status = ReadInto(&slot.batch, taken_ - 1);
  }
  if (!slot.status.ok()) return slot.status;
  return &slot.batch;
}

}  // namespace krait
