// Saving beside the training: the state is copied, a thread of its own writes the copy.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_ASYNC_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_ASYNC_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_save.h"

namespace krait {

// One save at a time. All calls from one thread, the main thread of its rank; the saver's own
// thread uses no OpenMP and communicates nothing.
//
// Of several ranks all make the same calls of Start, Advance, Poll and Wait in the same order, and
// get results that are alike (of an error the first rank has the message). Each rank's thread
// writes its file; once all are there, which the ranks learn at a step boundary, the first rank's
// thread writes the manifest and puts the checkpoint in place. On one rank the thread does both at
// once.
class AsyncSaver {
 public:
  explicit AsyncSaver(World* world = nullptr);
  AsyncSaver(const AsyncSaver&) = delete;
  AsyncSaver& operator=(const AsyncSaver&) = delete;
  // Waits for this rank's thread; the save's result is lost, and of several ranks the save itself:
  // call Wait() before.
  ~AsyncSaver();

  // Bytes that Start needs as staging for these boxes.
  static int64_t StagingBytes(const std::vector<CheckpointBox>& boxes);

  // Copies the boxes' bytes into `staging`, host memory, and returns; boxes of a device behind the
  // earlier work of ctx.stream. A thread then writes the copy, which must stay untouched until the
  // save is over. When a save is still under way, waits for it first; if that one failed, returns
  // its error and starts nothing. The save's error is SaveCheckpoint's, or kOutOfMemory; one that
  // is found before there is a thread (no space, no folder) comes from here.
  absl::Status Start(const SaveOptions& options, const CheckpointMeta& meta,
                     const std::vector<CheckpointBox>& boxes, void* staging, int64_t staging_bytes,
                     const Context& ctx = Context());

  // Whether there is a save whose result nobody has.
  bool busy() const { return stage_ != Stage::kNone; }
  // Whether this rank has nothing left to do in the save's present stage. Communicates nothing: the
  // flag for a word that the ranks exchange at the end of a step anyway.
  bool ready() const { return busy() && finished_; }
  // Takes the save to its next stage, or ends it and gives its result. To be called once all ranks
  // are ready(): it would wait for those that are not.
  std::optional<absl::Status> Advance();
  // Exchanges ready() and advances as far as all ranks are. The result of a save that has ended
  // since the last call; nothing while it runs, or when none was started. Waits for no disk.
  std::optional<absl::Status> Poll();
  // Waits for the save under way; its result, or OK when there is none.
  absl::Status Wait();

  // What the last finished save could not clear up (see SaveCheckpoint).
  const std::vector<std::string>& warnings() const { return warnings_; }
  // Of the last save started.
  const std::string& save_id() const { return save_.save_id; }

 private:
  enum class Stage { kNone, kWriting, kEnding };

  void Run(std::function<void()> work);

  World* world_;
  Stage stage_ = Stage::kNone;
  BegunSave save_;
  std::thread thread_;
  std::atomic<bool> finished_ = false;
  std::string report_;                 // the thread's until finished_
  absl::Status result_;                // likewise
  std::vector<std::string> warnings_;  // likewise
};

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_ASYNC_H_
