// Published weights (Hugging Face folders) to and from Krait's parameter table.
//
// Reads one tensor per expert or transformers' fused experts (model/hf.h); one file, or an index
// with shards. Writes one tensor per expert.
#ifndef KRAIT_TRAINER_TOOLS_INTEROP_H_
#define KRAIT_TRAINER_TOOLS_INTEROP_H_

#include <cstdint>
#include <functional>
#include <string>

#include "kernels/base/dtype.h"
#include "kernels/base/safetensors.h"
#include "model/spec.h"
#include "model/weights.h"

namespace krait {

// The model of FOLDER/config.json. kConfig for what Krait cannot compute.
absl::StatusOr<ModelSpec> ReadHfSpec(const std::string& folder);

// Fills target(p), f32, for every parameter p of the table from the published tensors.
// kNoCheckpoint with every tensor that is missing, unknown or of another shape.
absl::Status LoadHfWeights(const SafetensorsReader& reader, const ModelSpec& spec,
                           const ParamTable& table, const std::function<Tensor(int)>& target,
                           const Context& ctx);

struct ImportOptions {
  std::string hf;         // folder
  std::string out;        // checkpoint folder to make
  bool force = false;     // replace an older checkpoint at `out`
  std::string tokenizer;  // stored in the checkpoint; "": what the weight files say, if anything
};
// A checkpoint at step 0 that holds weights only.
absl::Status ImportHf(const ImportOptions& options);

struct ExportOptions {
  std::string checkpoint;
  std::string hf;             // folder to make
  bool force = false;         // replace an older export; an empty folder is filled in any case
  DType dtype = DType::kF32;  // or kBF16, rounded to nearest even
  int64_t shard_bytes = int64_t{5} << 30;
};
struct ExportReport {
  std::string checkpoint;  // the folder taken
  int64_t tensors = 0, bytes = 0, files = 0;
};
// config.json, generation_config.json and the weights; refuses a model that transformers' Jamba
// cannot express, with the reason. The folder appears whole or not at all.
absl::StatusOr<ExportReport> ExportHf(const ExportOptions& options);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_INTEROP_H_
