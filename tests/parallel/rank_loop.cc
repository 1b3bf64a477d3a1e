// A job for tests of failing ranks: collectives in a loop, until something happens.
//
//   rank_loop FOLDER TIMEOUT CASE     FOLDER: rank-N.pid of each rank, and reports
//
// Cases, of the last rank after some rounds: loop (nothing), fatal, throw, memory, exit, segfault,
// stuck (it computes for ever), late (it does not come to the end). With signals: loop until
// SIGUSR1, then 10. long: a phase of several timeouts without progress, then 0. idle: the same
// without a phase.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "kernels/base/check.h"
#include "kernels/base/stop_signals.h"
#include "parallel/watchdog.h"
#include "parallel/world.h"

namespace krait {
namespace {

constexpr int64_t kRounds = 200;

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// A name of its own in the report.
__attribute__((noinline)) void ComputeForEver() {
  for (volatile int64_t i = 0; i >= 0;) i = (i + 1) % 1000;
}

void Happen(const std::string& what) {
  if (what == "fatal") KRAIT_FATAL("a broken invariant");
  if (what == "throw") throw std::runtime_error("nobody catches this");
  if (what == "memory") Fatal(ExitCode::kOutOfMemory, __FILE__, __LINE__, "out of memory");
  if (what == "exit") _exit(21);
  if (what == "segfault") std::raise(SIGSEGV);
  if (what == "stuck") ComputeForEver();
}

int Run(World* world, const std::string& folder, double timeout, const std::string& what) {
  const StopSignals signals("stopping", /*of_a_rank=*/true);
  std::ofstream(folder + "/rank-" + std::to_string(world->rank()) + ".pid") << getpid() << "\n";
  world->SetHangTimeout(timeout, folder);
  const bool last = world->rank() == world->size() - 1;
  if (what == "long" || what == "idle") {
    const auto phase = what == "long" ? std::make_unique<LongPhase>() : nullptr;
    if (world->first()) Sleep(3 * timeout);
    world->Barrier();
    return 0;
  }
  for (int64_t round = 0;; ++round) {
    ReportProgress();
    if (round == kRounds && what == "late") {
      const LongPhase phase;
      if (last) Sleep(1000);
      return 0;
    }
    if (round == kRounds && last) Happen(what);
    int64_t stop = 0;
    for (const int64_t asked : world->AllGather(int64_t{StopRequested()})) stop += asked;
    if (stop > 0) return static_cast<int>(ExitCode::kStopped);
  }
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) {
  const auto world = krait::StartWorld(&argc, &argv);
  KRAIT_CHECK(world.ok() && argc == 4);
  return krait::Run(world->get(), argv[1], std::atof(argv[2]), argv[3]);
}
