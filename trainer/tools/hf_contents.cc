// What lies in a folder that holds no weights Krait reads (hf_folder.h).
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/file.h"
#include "trainer/tools/hf_folder.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;

// Files that say what a folder is, and what to do about it. The first kind found speaks.
struct Kind {
  bool (*is)(const std::string& file);
  const char* sentence;  // about the file
};

bool EndsWithAny(const std::string& text, const std::vector<std::string>& ends) {
  return std::any_of(ends.begin(), ends.end(),
                     [&](const std::string& end) { return text.ends_with(end); });
}

bool IsSafetensors(const std::string& file) {
  return EndsWithAny(file, {".safetensors", ".safetensors.index.json"});
}

// model-00001-of-00003.safetensors
bool IsShard(const std::string& file) {
  return file.starts_with("model-") && file.ends_with(".safetensors") &&
         file.find("-of-") != std::string::npos;
}

// model.fp16.safetensors, model.fp16-00001-of-00003.safetensors, model.safetensors.index.fp16.json
bool IsVariant(const std::string& file) {
  return (file.starts_with("model.") && file.ends_with(".safetensors")) ||
         (file.starts_with("model.safetensors.index.") && file.ends_with(".json"));
}

constexpr Kind kKinds[] = {
    {[](const std::string& f) {
       return f.starts_with("adapter_model") || f == "adapter_config.json";
     },
     "an adapter, not a model: merge it into its base model (merge_and_unload) and save that"},
    {IsVariant,
     "a variant: load it with transformers (variant=...) and save it without one, or rename it"},
    {IsShard, "shards without the model.safetensors.index.json that says which tensor lies where"},
    {IsSafetensors, "which is not the name that transformers gives a model's weights"},
    {[](const std::string& f) {
       return f.starts_with("pytorch_model") && f.find(".bin") != std::string::npos;
     },
     "pickled weights, of which Krait reads none: load them with transformers and save them as "
     "safetensors (save_pretrained)"},
    {[](const std::string& f) {
       return EndsWithAny(f, {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".gguf", ".ggml",
                              ".onnx", ".h5", ".msgpack", ".nemo", ".distcp"});
     },
     "another format: Krait reads safetensors, which transformers writes (save_pretrained)"},
};

}  // namespace

absl::Status CheckHfContents(const std::string& path) {
  if (!Exists(path)) return Error(kCode, path + ": there is no such folder");
  if (!IsDirectory(path)) {
    return Error(kCode, path + " is no folder; name the one with config.json and the weights");
  }
  for (const char* name : {"/model.safetensors", "/model.safetensors.index.json"}) {
    if (Exists(path + name)) return absl::OkStatus();
  }
  std::vector<std::string> files;
  KRAIT_ASSIGN_OR_RETURN(files, ListDirectory(path, kCode));
  std::sort(files.begin(), files.end());
  for (const Kind& kind : kKinds) {
    const auto found = std::find_if(files.begin(), files.end(), kind.is);
    if (found == files.end()) continue;
    return Error(kCode, absl::StrFormat("%s holds no model.safetensors, but %s: %s", path, *found,
                                        kind.sentence));
  }
  return Error(kCode, path + " holds neither model.safetensors nor model.safetensors.index.json");
}

}  // namespace krait
