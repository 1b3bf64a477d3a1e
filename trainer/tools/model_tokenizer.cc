#include "trainer/tools/model_tokenizer.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "data/byte_alphabet.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"

namespace krait {
namespace {

// Adds the ids of "eos_token_id" of a config: a number or a list of them.
void AddEndTokens(const std::string& text, std::vector<int32_t>* ids) {
  if (text.empty()) return;
  const auto json = ParsePythonJson(text, "config", ExitCode::kNoCheckpoint);
  if (!json.ok() || !json->is_object() || !json->contains("eos_token_id")) return;
  const nlohmann::json& value = (*json)["eos_token_id"];
  for (const nlohmann::json& id : value.is_array() ? value : nlohmann::json::array({value})) {
    if (!id.is_number_integer()) continue;
    ids->push_back(static_cast<int32_t>(std::clamp<int64_t>(id.get<int64_t>(), -1, INT32_MAX)));
  }
}

// The byte-level BPE without merges whose ids are the bytes.
std::string BytesAsJson() {
  const ByteAlphabet alphabet;
  nlohmann::ordered_json vocab;
  for (size_t byte = 0; byte < 256; ++byte) vocab[alphabet.character(byte)] = byte;
  const nlohmann::ordered_json level = {{"type", "ByteLevel"},
                                        {"add_prefix_space", false},
                                        {"trim_offsets", true},
                                        {"use_regex", false}};
  return nlohmann::ordered_json({{"version", "1.0"},
                                 {"truncation", nullptr},
                                 {"padding", nullptr},
                                 {"added_tokens", nlohmann::ordered_json::array()},
                                 {"normalizer", nullptr},
                                 {"pre_tokenizer", level},
                                 {"post_processor", nullptr},
                                 {"decoder", level},
                                 {"model",
                                  {{"type", "BPE"},
                                   {"dropout", nullptr},
                                   {"unk_token", nullptr},
                                   {"continuing_subword_prefix", nullptr},
                                   {"end_of_word_suffix", nullptr},
                                   {"fuse_unk", false},
                                   {"byte_fallback", false},
                                   {"ignore_merges", false},
                                   {"vocab", vocab},
                                   {"merges", nlohmann::ordered_json::array()}}}})
             .dump(2) +
         "\n";
}

}  // namespace

absl::StatusOr<ModelTokenizer> TokenizerOf(const Checkpoint& checkpoint, const std::string& named) {
  const std::string& name = checkpoint.meta.tokenizer;
  ModelTokenizer result;
  if (!named.empty() || name == "bytes") {
    const std::string& source = named.empty() ? name : named;
    KRAIT_ASSIGN_OR_RETURN(result.files, ReadTokenizerFiles(source));
    KRAIT_ASSIGN_OR_RETURN(result.tokenizer, MakeTokenizer(result.files, source));
    return result;
  }
  if (name.empty()) {
    return Error(ExitCode::kConfig,
                 checkpoint.path + " names no tokenizer: add --tokenizer bytes|FILE");
  }
  const std::string places[] = {checkpoint.path + "/tokenizer",
                                ParentFolder(checkpoint.path) + "/tokenizer"};
  std::string others;
  for (const std::string& place : places) {
    if (!IsDirectory(place)) continue;
    KRAIT_ASSIGN_OR_RETURN(result.files, ReadTokenizerFiles(place));
    KRAIT_ASSIGN_OR_RETURN(result.tokenizer, MakeTokenizer(result.files, place));
    if (result.tokenizer->name() == name) return result;
    others += absl::StrFormat("; %s holds %s", place, result.tokenizer->name());
  }
  return Error(ExitCode::kConfig,
               absl::StrFormat("%s: its tokenizer %s is neither in %s nor in %s%s: add --tokenizer "
                               "FILE",
                               checkpoint.path, name, places[0], places[1], others));
}

absl::Status CheckVocabulary(const Tokenizer& tokenizer, int64_t vocab_size,
                             const std::string& model) {
  if (tokenizer.vocab_size() <= vocab_size) return absl::OkStatus();
  return Error(ExitCode::kConfig,
               absl::StrFormat("%s has a vocabulary of %d, but its tokenizer has ids up to %d",
                               model, vocab_size, tokenizer.vocab_size() - 1));
}

std::vector<int32_t> EndTokens(const Tokenizer& tokenizer, const CheckpointMeta& meta) {
  std::vector<int32_t> ids;
  if (tokenizer.end_token().has_value()) ids.push_back(*tokenizer.end_token());
  AddEndTokens(meta.hf_generation_config, &ids);
  AddEndTokens(meta.hf_config, &ids);
  return ids;
}

TokenizerFiles FilesForHf(const ModelTokenizer& tokenizer) {
  TokenizerFiles files = tokenizer.files;
  if (files.empty()) files["tokenizer.json"] = BytesAsJson();
  if (files.contains("tokenizer_config.json")) return files;
  const bool json = files.contains("tokenizer.json");
  // Without a class transformers takes the one that it has for Jamba, which changes the steps.
  nlohmann::ordered_json config = {
      {"tokenizer_class", json ? "PreTrainedTokenizerFast" : "LlamaTokenizer"},
      {"clean_up_tokenization_spaces", false}};
  if (!json) {
    config["legacy"] = true;
    config["add_bos_token"] = !tokenizer.tokenizer->prefix().empty();
    config["add_eos_token"] = false;
  }
  const auto name = [&](const char* key, int32_t id) {
    const std::string text = tokenizer.tokenizer->TokenText(id);
    if (!text.empty()) config[key] = text;
  };
  if (!tokenizer.tokenizer->prefix().empty()) {
    name("bos_token", tokenizer.tokenizer->prefix().front());
  }
  if (tokenizer.tokenizer->end_token().has_value()) {
    name("eos_token", *tokenizer.tokenizer->end_token());
  }
  files["tokenizer_config.json"] = config.dump(2) + "\n";
  return files;
}

}  // namespace krait
