// The rows of the steps to come, read in the background while a step computes.
#ifndef KRAIT_DATA_READ_AHEAD_H_
#define KRAIT_DATA_READ_AHEAD_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "data/sampler.h"
#include "kernels/base/status.h"

namespace krait {

// What a rank reads of each step: `rows` positions of every `stride`, `passes` times (the second
// Dataset::ReadTraining). The next step begins passes * stride positions later.
struct StepRows {
  int64_t passes = 1, stride = 1, rows = 1;
};

// Reads the steps in their order: what a step gets is what reading it then would give, and an error
// of reading is the error of the step whose rows it concerns, and of all later ones. Nothing here
// is a position of the run: that is what the steps have taken.
//
// One thread calls it. While there is an object, its own thread is the one that reads from the
// dataset.
class ReadAhead {
 public:
  // From training position `first` on, `steps` steps. Memory: Batches() batches, taken at once.
  ReadAhead(const Dataset* data, const StepRows& rows, int64_t first, int64_t steps);
  // Ends within the time of reading one row.
  ~ReadAhead();
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  // The rows of the next step, valid until the next call; waits where they are not there yet. At
  // most `steps` calls.
  absl::StatusOr<const TokenBatch*> Next();

  // How many batches of `tokens` tokens there are in memory: the one that is computed, and those
  // that are ready or being read, which are 128Ki tokens or a whole step, whichever is more.
  static int64_t Batches(int64_t tokens);

 private:
  struct Slot {
    TokenBatch batch;
    absl::Status status;
  };
  void Read();
  absl::Status ReadInto(TokenBatch* batch, int64_t step);

  const Dataset* const data_;
  const StepRows rows_;
  const int64_t first_, steps_;
  std::vector<Slot> slots_;  // step s is in slot s mod their number
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t read_ = 0, taken_ = 0;  // steps; those taken less the last are free to be overwritten
  std::atomic<bool> ending_ = false;
  std::thread thread_;
};

}  // namespace krait

#endif  // KRAIT_DATA_READ_AHEAD_H_
