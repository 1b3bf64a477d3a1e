// A Hugging Face folder of a Jamba model, as it is found: config.json, generation_config.json and
// safetensors weights, one file or an index with shards.
#ifndef KRAIT_TRAINER_TOOLS_HF_FOLDER_H_
#define KRAIT_TRAINER_TOOLS_HF_FOLDER_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/base/safetensors.h"
#include "kernels/base/status.h"
#include "model/hf.h"
#include "model/params.h"
#include "model/spec.h"

namespace krait {

// The tokenizer's name, in the metadata of the weight files that export writes.
inline constexpr char kTokenizerKey[] = "krait.tokenizer";

class HfFolder {
 public:
  // Reads all but the weights, and checks every tensor's name, shape and dtype. Weights are one
  // tensor per expert or transformers' fused experts, under the names of any version, in F32, BF16,
  // F16 or F64.
  //
  // Of a tied model the matrix may be stored as embedding, as head, or as both: where these hold
  // different values the model is read as untied (which reads both).
  //
  // kConfig for what Krait cannot compute. kNoCheckpoint for a folder without safetensors weights
  // (naming what there is instead), quantised weights, a wrapper's prefix before all names, and
  // tensors that are missing, unknown or of another shape.
  static absl::StatusOr<HfFolder> Open(const std::string& path);

  const std::string& path() const { return path_; }
  const ModelSpec& spec() const { return config_.spec; }
  // What the folder says beyond the model: as CheckpointMeta::hf_config and hf_generation_config.
  const std::string& kept() const { return config_.kept; }
  const std::string& generation_config() const { return generation_config_; }
  // Stored by export; "" where there is none.
  std::string tokenizer() const;
  // A line each for the user: what was passed over or read otherwise than it says.
  const std::vector<std::string>& notes() const { return config_.notes; }

  // Finds the parameters of `table` (of `spec`), which Read then takes by index; errors as Open.
  absl::Status Locate(const ModelSpec& spec, const ParamTable& table);
  // Elements [begin, begin + count) of a parameter, as f32.
  absl::Status Read(int param, int64_t begin, int64_t count, float* out) const;
  // In f32, or in bf16 where that is what the folder holds.
  DType dtype(int param) const;
  absl::Status ReadStored(int param, int64_t begin, int64_t count, void* out) const;

 private:
  // By the name that today's transformers gives it.
  const SafetensorsEntry* Find(const std::string& published) const;
  absl::Status ReadNames();
  absl::Status ReadTied();
  absl::Status CheckDTypes() const;
  absl::StatusOr<bool> Equal(const std::string& a, const std::string& b) const;

  std::string path_;
  HfConfig config_;
  std::string generation_config_;
  SafetensorsReader reader_;
  std::map<std::string, std::string> stored_;  // published name to the one in the files
  std::vector<HfSource> places_;               // of the parameters, by stored name
};

// Why `path` cannot be read as a Hugging Face folder of safetensors weights, by what lies in it; OK
// where it holds some.
absl::Status CheckHfContents(const std::string& path);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_HF_FOLDER_H_
