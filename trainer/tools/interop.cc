#include "trainer/tools/interop.h"

#include <vector>

#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "model/params.h"
#include "trainer/config/config.h"
#include "trainer/tools/hf_folder.h"

namespace krait {
namespace {

// "a/b/c/" -> "c".
std::string LastPart(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path.substr(path.rfind('/') + 1);
}

}  // namespace

std::vector<CheckpointBox> WholeTensors(const ParamTable& table, DType dtype) {
  std::vector<CheckpointBox> boxes;
  for (const Param& param : table.params()) {
    boxes.push_back({.slot = "weight",
                     .name = param.name,
                     .dtype = dtype,
                     .shape = param.shape,
                     .offset = std::vector<int64_t>(param.shape.size()),
                     .extent = param.shape});
  }
  return boxes;
}

absl::Status ImportHf(const ImportOptions& options, const Notice& notice) {
  if (Exists(options.out)) {
    const bool checkpoint = Exists(options.out + "/manifest.json");
    if (!checkpoint || !options.force) {
      return Error(ExitCode::kConfig, "--out " + options.out +
                                          " exists already; name another folder" +
                                          (checkpoint ? ", or add --force to replace it" : ""));
    }
  }
  if (!options.tokenizer.empty()) {
    KRAIT_RETURN_IF_ERROR(MakeTokenizer(options.tokenizer).status());
  }
  auto folder = HfFolder::Open(options.hf);
  if (!folder.ok()) return folder.status();
  for (const std::string& note : folder->notes()) notice(note);
  RunConfig config;
  config.model = folder->spec();
  // What a checkpoint says has to be readable again.
  KRAIT_RETURN_IF_ERROR(ParseConfig(config.ToYaml(), options.hf + "/config.json, as Krait's config",
                                    {}, ConfigUse::kStored, /*ranks=*/1)
                            .status());
  const ParamTable table(config.model);
  KRAIT_RETURN_IF_ERROR(folder->Locate(config.model, table));

  CheckpointMeta meta;
  meta.config_yaml = config.ToYaml();
  meta.tokenizer = options.tokenizer.empty() ? folder->tokenizer() : options.tokenizer;
  meta.hf_config = folder->kept();
  meta.hf_generation_config = folder->generation_config();
  SaveOptions save;
  save.dir = ParentFolder(options.out);
  save.name = LastPart(options.out);
  absl::Status read;  // an error of the folder, not of the save
  const auto source = [&](size_t box, int64_t begin, int64_t count, void* out) {
    read = folder->ReadStored(static_cast<int>(box), begin, count, out);
    return read;
  };
  std::vector<CheckpointBox> boxes = WholeTensors(table, DType::kF32);
  for (size_t p = 0; p < boxes.size(); ++p) boxes[p].dtype = folder->dtype(static_cast<int>(p));
  const absl::Status saved = SaveCheckpoint(save, meta, boxes, nullptr, source);
  return read.ok() ? saved : read;
}

}  // namespace krait
