// Published weights (Hugging Face folders) to and from Krait's parameter table.
//
// A model need not fit in memory: both hold a piece of one tensor at a time. Export writes one
// tensor per expert.
#ifndef KRAIT_TRAINER_TOOLS_INTEROP_H_
#define KRAIT_TRAINER_TOOLS_INTEROP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/progress.h"
#include "kernels/base/status.h"
#include "model/params.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

// Every parameter of a table as one box of slot "weight" without memory, which SaveCheckpoint and
// StreamTensors take in pieces.
std::vector<CheckpointBox> WholeTensors(const ParamTable& table, DType dtype);

struct ImportOptions {
  std::string hf;         // folder
  std::string out;        // checkpoint folder to make
  bool force = false;     // replace an older checkpoint at `out`
  std::string tokenizer;  // "bytes" or a path; "": the folder's
  Progress progress;      // counts elements; its error ends the work
};
// A checkpoint at step 0 that holds weights only, in f32 or where the folder holds them so in bf16,
// and what the folder says beyond the model
// (HfFolder), a notice for each of its notes. The tokenizer's files go into its folder `tokenizer`;
// one in the folder that Krait does not read is left, with a notice.
absl::Status ImportHf(const ImportOptions& options, const Notice& notice);

struct ExportOptions {
  std::string checkpoint;
  std::string hf;             // folder to make
  bool force = false;         // replace an older export; an empty folder is filled in any case
  DType dtype = DType::kF32;  // or kBF16, rounded to nearest even
  int64_t shard_bytes = int64_t{5} << 30;
  std::string tokenizer;  // "bytes" or a path; "": the checkpoint's
  Progress progress;      // counts elements; its error ends the work
};
struct ExportReport {
  std::string checkpoint;  // the folder taken
  int64_t tensors = 0, bytes = 0, files = 0;
};
// config.json, generation_config.json, the weights and the tokenizer, with what an imported folder
// said beyond the model; a notice where the tokenizer is not to be had; refuses a model that
// transformers' Jamba cannot express, with the reason. The folder appears whole or not at all.
absl::StatusOr<ExportReport> ExportHf(const ExportOptions& options, const Notice& notice);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_INTEROP_H_
