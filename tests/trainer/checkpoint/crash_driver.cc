// Saves checkpoints so that crash_test can kill it in the middle:
//   crash_driver DIR STEP KEEP GENERATION SCALE RANKS
// The content is a function of (step, generation); meta.adam_steps says which. The parts of several
// ranks are written one after the other, the boxes dealt out among them. Prints "begin" and "end"
// around the save, exits with the code of the save's error.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "trainer/checkpoint/checkpoint_save.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace {

void Say(const char* word) {
  if (write(1, word, std::strlen(word)) < 0) _exit(98);
}

absl::Status Save(const krait::SaveOptions& options, const krait::CheckpointMeta& meta,
                  const std::vector<krait::CheckpointBox>& boxes, size_t ranks) {
  if (ranks == 1) return krait::SaveCheckpoint(options, meta, boxes);
  KRAIT_ASSIGN_OR_RETURN(const krait::BegunSave save,
                         krait::BeginSave(options, meta, boxes, nullptr));
  std::vector<std::string> reports;
  for (size_t r = 0; r < ranks; ++r) {
    std::vector<krait::CheckpointBox> mine;
    for (size_t i = r; i < boxes.size(); i += ranks) mine.push_back(boxes[i]);
    reports.push_back(krait::WriteShard(save, static_cast<int>(r), mine));
  }
  return krait::EndSave(save, reports, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 97;
  const long step = std::atol(argv[2]), keep = std::atol(argv[3]);
  const long content = step + 1000 * std::atol(argv[4]);
  auto state = krait::testing_checkpoint::SmallState(std::atol(argv[5]));
  krait::testing_checkpoint::Fill(content, &state);
  krait::CheckpointMeta meta = krait::testing_checkpoint::SmallMeta(step);
  meta.adam_steps = content;
  Say("begin\n");
  const absl::Status status =
      Save({argv[1], keep, ""}, meta, state.boxes, static_cast<size_t>(std::atol(argv[6])));
  Say("end\n");
  if (!status.ok()) std::fprintf(stderr, "%s\n", krait::MessageOf(status).c_str());
  return static_cast<int>(krait::ExitCodeOf(status));
}
