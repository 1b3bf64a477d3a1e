// Saves checkpoints so that crash_test can kill it in the middle:
//   crash_driver DIR STEP KEEP GENERATION SCALE
// The content is a function of (step, generation); meta.adam_steps says which. Prints "begin" and
// "end" around the save, exits with the code of the save's error.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "trainer/checkpoint/checkpoint_testing.h"

namespace {

void Say(const char* word) {
  if (write(1, word, std::strlen(word)) < 0) _exit(98);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 97;
  const long step = std::atol(argv[2]), keep = std::atol(argv[3]);
  const long content = step + 1000 * std::atol(argv[4]);
  auto state = krait::testing_checkpoint::SmallState(std::atol(argv[5]));
  krait::testing_checkpoint::Fill(content, &state);
  krait::CheckpointMeta meta = krait::testing_checkpoint::SmallMeta(step);
  meta.adam_steps = content;
  Say("begin\n");
  const absl::Status status = krait::SaveCheckpoint({argv[1], keep, ""}, meta, state.boxes);
  Say("end\n");
  if (!status.ok()) std::fprintf(stderr, "%s\n", krait::MessageOf(status).c_str());
  return static_cast<int>(krait::ExitCodeOf(status));
}
