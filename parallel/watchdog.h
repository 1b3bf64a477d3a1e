// Ends a rank that makes no progress, with a report: a job whose ranks wait for one another, or for
// one that stands still, would hold its machines until somebody looks.
#ifndef KRAIT_PARALLEL_WATCHDOG_H_
#define KRAIT_PARALLEL_WATCHDOG_H_

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

#include "kernels/base/exit_code.h"

namespace krait {

// Progress: a step boundary says so here; each collective does when it begins and ends. Any thread.
void ReportProgress();

// Work that may take long between two signs of progress, here or on a rank that this one waits for:
// loading, saving, evaluating. The limit is ten times as long until the end of the scope, which
// belongs on all ranks, around the work and the agreement after it.
class LongPhase {
 public:
  LongPhase();
  ~LongPhase();
  LongPhase(const LongPhase&) = delete;
  LongPhase& operator=(const LongPhase&) = delete;
};

// A thread that ends this process with kCollective after `seconds` without progress. It says so in
// one line on standard error, with the rank that is waited for, and writes the stacks of all
// threads and the last collectives to FOLDER/hang-rank-N.txt (to standard error where that cannot
// be written); then it gives the other ranks a few seconds for their reports, and leaves by _exit,
// since MPI may be what hangs. Time in which the whole process is stopped does not count. At most
// one object at a time.
class Watchdog {
 public:
  Watchdog(int rank, double seconds, std::string folder);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // Other limits from here on. Any thread.
  void Set(double seconds, const std::string& folder);

 private:
  void Watch();
  [[noreturn]] void End(double seconds, const std::string& folder) const;

  const int rank_;
  std::mutex mutex_;
  std::condition_variable changed_;
  double seconds_;
  std::string folder_;
  bool ending_ = false;
  std::thread thread_;
};

// The process ends with `code` after so many seconds, whatever it is in by then.
void ExitWithin(int seconds, ExitCode code);

}  // namespace krait

#endif  // KRAIT_PARALLEL_WATCHDOG_H_
