// A job for tests of failing ranks: collectives in a loop, until something happens.
//
//   rank_loop FOLDER TIMEOUT CASE [SECONDS]     FOLDER: rank-N.pid of each rank, and reports
//
// SECONDS: the ranks meet by TCP, within so many.
//
// Cases, of the last rank after some rounds: loop (nothing), fatal, throw, memory, exit, segfault,
// stuck (it computes for ever), late (it does not come to the end). With signals: loop until
// SIGUSR1, then 10. check: what the ranks tell each other, then 0. long: a phase of several
// timeouts without progress, then 0. idle: the same without a phase.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/stop_signals.h"
#include "parallel/tcp.h"
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

// Texts of many sizes, in rounds; numbers; messages to and from the first rank.
void CheckMessages(World* world) {
  const auto text = [](int rank, int64_t round) {
    const auto size = static_cast<size_t>((rank * 7919 + round * round * 997) % 300'000);
    return std::string(size, static_cast<char>('a' + (rank + round) % 26));
  };
  for (int64_t round = 0; round < 60; ++round) {
    const std::vector<std::string> texts = world->AllGather(text(world->rank(), round));
    const std::vector<int64_t> numbers = world->AllGather(round * 100 + world->rank());
    KRAIT_CHECK(texts.size() == static_cast<size_t>(world->size()) &&
                numbers.size() == texts.size());
    for (int r = 0; r < world->size(); ++r) {
      KRAIT_CHECK(texts[static_cast<size_t>(r)] == text(r, round));
      KRAIT_CHECK(numbers[static_cast<size_t>(r)] == round * 100 + r);
    }
    KRAIT_CHECK(world->Broadcast(text(world->rank(), round)) == text(0, round));
    std::string mine = text(world->rank(), round) + "!", answer = text(0, round + 1) + "!";
    std::vector<std::string> parts(texts.size());
    std::vector<Message> to, from;
    const auto message = [](int rank, std::string* bytes) {
      return Message{rank, bytes->data(), static_cast<int64_t>(bytes->size())};
    };
    if (world->first()) {
      for (int r = 1; r < world->size(); ++r) {
        parts[static_cast<size_t>(r)].resize(text(r, round).size() + 1);
        from.push_back(message(r, &parts[static_cast<size_t>(r)]));
        to.push_back(message(r, &answer));
      }
    } else {
      parts[0].resize(answer.size());
      to.push_back(message(0, &mine));
      from.push_back(message(0, &parts[0]));
    }
    world->Exchange(to, from);
    if (!world->first()) KRAIT_CHECK(parts[0] == answer);
    for (int r = 1; world->first() && r < world->size(); ++r) {
      KRAIT_CHECK(parts[static_cast<size_t>(r)] == text(r, round) + "!");
    }
  }
  const absl::Status failed =
      Agree(world, world->rank() == 1 ? Error(ExitCode::kData, "a fault") : absl::OkStatus());
  KRAIT_CHECK(ExitCodeOf(failed) == ExitCode::kData);
  KRAIT_CHECK(MessageOf(failed) == (world->first() ? "rank 1: a fault" : ""));
}

int Run(World* world, const std::string& folder, double timeout, const std::string& what) {
  const StopSignals signals("stopping", /*of_a_rank=*/true);
  std::ofstream(folder + "/rank-" + std::to_string(world->rank()) + ".pid") << getpid() << "\n";
  world->SetHangTimeout(timeout, folder);
  if (what == "check") {
    CheckMessages(world);
    return 0;
  }
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
  KRAIT_CHECK(argc == 4 || argc == 5);
  absl::StatusOr<std::unique_ptr<krait::World>> world;
  if (argc == 4) {
    world = krait::StartWorld(&argc, &argv);
  } else {
    auto job = krait::TcpJobOfThisProcess(krait::LaunchOfThisProcess(), argc, argv);
    if (job.ok()) job->start_seconds = std::atof(argv[4]);
    world = job.ok() ? krait::StartTcpWorld(*job) : job.status();
  }
  if (!world.ok()) {
    const std::string message = krait::MessageOf(world.status());
    if (!message.empty()) std::fprintf(stderr, "krait: %s\n", message.c_str());
    return static_cast<int>(krait::ExitCodeOf(world.status()));
  }
  return krait::Run(world->get(), argv[1], std::atof(argv[2]), argv[3]);
}
