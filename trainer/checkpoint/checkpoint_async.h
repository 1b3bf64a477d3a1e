// Saving beside the training: the state is copied, a thread of its own writes the copy.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_ASYNC_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_ASYNC_H_

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

// One save at a time. All calls from one thread; the writer thread uses no OpenMP and, once there
// are several ranks, no MPI.
class AsyncSaver {
 public:
  AsyncSaver() = default;
  AsyncSaver(const AsyncSaver&) = delete;
  AsyncSaver& operator=(const AsyncSaver&) = delete;
  ~AsyncSaver();  // waits for a save under way; its result is lost: call Wait() before

  // Bytes that Start needs as staging for these boxes.
  static int64_t StagingBytes(const std::vector<CheckpointBox>& boxes);

  // Copies the boxes' bytes into `staging`, host memory, and returns; boxes of a device behind the
  // earlier work of ctx.stream. A thread then runs SaveCheckpoint on the copy, which must stay
  // untouched until the save is over. When a save is still under way, waits
  // for it first; if that one failed, returns its error and starts nothing. The save's error is
  // SaveCheckpoint's, or kOutOfMemory.
  absl::Status Start(const SaveOptions& options, const CheckpointMeta& meta,
                     const std::vector<CheckpointBox>& boxes, void* staging, int64_t staging_bytes,
                     const Context& ctx = Context());

  bool busy() const { return thread_.joinable(); }
  // The result of a save that has ended since the last call; nothing while it runs, or when none
  // was started. Does not block.
  std::optional<absl::Status> Poll();
  // Waits for the save under way; its result, or OK when there is none.
  absl::Status Wait();
  // What the last finished save could not clear up (see SaveCheckpoint).
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  std::thread thread_;
  std::atomic<bool> finished_ = false;
  absl::Status result_;                // the thread's until finished_
  std::vector<std::string> warnings_;  // likewise
};

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_ASYNC_H_
