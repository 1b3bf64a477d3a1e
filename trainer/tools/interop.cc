#include "trainer/tools/interop.h"

#include <memory>
#include <vector>

#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "model/params.h"
#include "trainer/config/config.h"
#include "trainer/tools/hf_folder.h"
#include "trainer/tools/model_tokenizer.h"
#include "trainer/tools/output_lock.h"

namespace krait {
namespace {

// "a/b/c/" -> "c".
std::string LastPart(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path.substr(path.rfind('/') + 1);
}

struct FoundTokenizer {
  std::string name;  // "": none
  TokenizerFiles files;
};

// What the user named; else what an export of Krait's says, or lies in the folder.
absl::StatusOr<FoundTokenizer> FindTokenizer(const ImportOptions& options, const HfFolder& folder,
                                             const Notice& notice) {
  FoundTokenizer found;
  const bool named = !options.tokenizer.empty();
  const bool bytes = !named && folder.tokenizer() == "bytes";
  const bool lies_there =
      Exists(options.hf + "/tokenizer.json") || Exists(options.hf + "/tokenizer.model");
  if (!named && !bytes && !lies_there) return found;
  const std::string source = named ? options.tokenizer : bytes ? "bytes" : options.hf;
  const auto make = [&]() -> absl::Status {
    KRAIT_ASSIGN_OR_RETURN(found.files, ReadTokenizerFiles(source));
    std::unique_ptr<Tokenizer> tokenizer;
    KRAIT_ASSIGN_OR_RETURN(tokenizer, MakeTokenizer(found.files, source));
    KRAIT_RETURN_IF_ERROR(CheckVocabulary(*tokenizer, folder.spec().vocab_size, options.hf));
    found.name = tokenizer->name();
    return absl::OkStatus();
  };
  const absl::Status made = make();
  if (made.ok()) return found;
  if (named) return made;
  notice("the tokenizer is left: " + MessageOf(made));
  return FoundTokenizer();
}

absl::Status CheckOut(const ImportOptions& options) {
  if (!Exists(options.out)) return absl::OkStatus();
  const bool checkpoint = Exists(options.out + "/manifest.json");
  if (checkpoint && options.force) return absl::OkStatus();
  return Error(ExitCode::kConfig, "--out " + options.out + " exists already; name another folder" +
                                      (checkpoint ? ", or add --force to replace it" : ""));
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
  KRAIT_RETURN_IF_ERROR(CheckOut(options));
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

  FoundTokenizer tokenizer;
  KRAIT_ASSIGN_OR_RETURN(tokenizer, FindTokenizer(options, *folder, notice));

  OutputLock lock;
  KRAIT_ASSIGN_OR_RETURN(lock, OutputLock::Acquire("--out", options.out));
  KRAIT_RETURN_IF_ERROR(CheckOut(options));  // of another one, a moment ago

  CheckpointMeta meta;
  meta.config_yaml = config.ToYaml();
  meta.tokenizer = tokenizer.name;
  meta.hf_config = folder->kept();
  meta.hf_generation_config = folder->generation_config();
  SaveOptions save;
  save.dir = ParentFolder(options.out);
  save.name = LastPart(options.out);
  absl::Status read;  // an error of the folder, or a wish to stop, not of the save
  int64_t done = 0;
  const auto source = [&](size_t box, int64_t begin, int64_t count, void* out) {
    if (options.progress) read = options.progress(done, table.total());
    done += count;
    if (read.ok()) read = folder->ReadStored(static_cast<int>(box), begin, count, out);
    return read;
  };
  std::vector<CheckpointBox> boxes = WholeTensors(table, DType::kF32);
  for (size_t p = 0; p < boxes.size(); ++p) boxes[p].dtype = folder->dtype(static_cast<int>(p));
  const absl::Status saved = SaveCheckpoint(save, meta, boxes, nullptr, source);
  KRAIT_RETURN_IF_ERROR(read.ok() ? saved : read);
  if (tokenizer.files.empty()) return absl::OkStatus();
  return WriteTokenizerFiles(tokenizer.files, options.out + "/tokenizer", ExitCode::kCannotSave);
}

}  // namespace krait
