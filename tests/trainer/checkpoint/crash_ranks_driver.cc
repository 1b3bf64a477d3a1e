// Ranks that save again and again in the background, so that crash_job_test can kill one of them,
// or mpirun, at any moment:
//   mpirun -n N crash_ranks_driver DIR STEPS
// Goes on from the newest whole checkpoint of DIR, of which every bit is compared, to step STEPS.
// Each rank prints "pid PID"; the first one "resumed STEP", and "saved STEP" once a save is in
// place.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "parallel/world.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

int End(const World& world, const absl::Status& status) {
  if (world.first() && !status.ok()) std::fprintf(stderr, "%s\n", MessageOf(status).c_str());
  return static_cast<int>(ExitCodeOf(status));
}

int Run(World* world, const std::string& dir, int64_t steps) {
  std::printf("pid %d\n", static_cast<int>(getpid()));
  std::fflush(stdout);
  const int64_t rows = 3000, all = rows * world->size();
  testing_checkpoint::State state;
  for (const char* slot : {"weight", "exp_avg"}) {
    state.Add(slot, "a.weight", DType::kF32, {all, 9}, {rows * world->rank(), 0}, {rows, 9});
  }
  int64_t step = 0;
  std::vector<std::string> folders;
  if (world->first()) folders = *ListCheckpoints(dir);
  if (world->AllGather(static_cast<int64_t>(folders.size()))[0] > 0) {
    std::vector<PassedOver> passed_over;
    const auto loaded = LoadNewestWhole(
        folders, [&](const Checkpoint& c) { return LoadBoxes(c, state.boxes); }, &passed_over,
        world);
    if (!loaded.ok()) return End(*world, loaded.status());
    step = loaded->meta.step;
    // A kill leaves no damaged ones: what is under its final name is whole.
    const bool right = testing_checkpoint::Holds(step, state) && passed_over.empty();
    const absl::Status agreed =
        Agree(world, right ? absl::OkStatus() : Error(ExitCode::kNo, "not what was saved"));
    if (!agreed.ok()) return End(*world, agreed);
  }
  if (world->first()) std::printf("resumed %d\n", static_cast<int>(step));
  std::fflush(stdout);
  AsyncSaver saver(world);
  std::vector<char> staging(static_cast<size_t>(AsyncSaver::StagingBytes(state.boxes)));
  SaveOptions options{dir, 2, ""};
  options.box_bytes = 16 << 10;
  int64_t saving = 0;
  const auto said = [&](const absl::Status& status) {
    if (world->first() && status.ok()) std::printf("saved %d\n", static_cast<int>(saving));
    std::fflush(stdout);
    return status;
  };
  while (step < steps) {
    ++step;
    testing_checkpoint::Fill(step, &state);
    // Some are waited for, as by the end of a run, the others polled.
    if (step % 3 == 0 && saver.busy()) {
      if (const absl::Status status = said(saver.Wait()); !status.ok()) return End(*world, status);
    }
    if (!saver.busy()) {
      saving = step;
      const absl::Status started =
          saver.Start(options, testing_checkpoint::SmallMeta(step), state.boxes, staging.data(),
                      static_cast<int64_t>(staging.size()));
      if (!started.ok()) return End(*world, started);
    }
    if (const auto ended = saver.Poll(); ended.has_value()) {
      if (!said(*ended).ok()) return End(*world, *ended);
    }
  }
  if (saver.busy()) {
    if (const absl::Status status = said(saver.Wait()); !status.ok()) return End(*world, status);
  }
  saving = steps;
  return End(*world, said(SaveCheckpoint(options, testing_checkpoint::SmallMeta(steps), state.boxes,
                                         nullptr, nullptr, world)));
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) {
  if (argc != 3) return 97;
  const std::unique_ptr<krait::World> world = krait::StartWorld(&argc, &argv);
  return krait::Run(world.get(), argv[1], std::atol(argv[2]));
}
