#include "data/tokenizer.h"

#include <algorithm>
#include <array>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "data/content_hash.h"
#include "data/tokenizer_kinds.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"

namespace krait {
namespace {

constexpr int64_t kMaxFile = 100'000'000;  // bytes
constexpr char kJsonFile[] = "tokenizer.json";
constexpr char kModelFile[] = "tokenizer.model";
// What transformers keeps beside them.
constexpr std::array kCompanions = {"tokenizer_config.json",
                                    "special_tokens_map.json",
                                    "added_tokens.json",
                                    "chat_template.jinja",
                                    "vocab.json",
                                    "merges.txt"};

class ByteTokenizer : public Tokenizer {
 public:
  ByteTokenizer() {
    name_ = "bytes";
    vocab_size_ = 256;
  }
  absl::Status Encode(std::string_view text, std::vector<int32_t>* ids) override {
    for (const char c : text) ids->push_back(static_cast<unsigned char>(c));
    return absl::OkStatus();
  }
  bool splits_anywhere() const override { return true; }
  std::string Decode(int32_t id, bool /*at_start*/) const override {
    return id >= 0 && id < 256 ? std::string(1, static_cast<char>(id)) : std::string();
  }
  std::unique_ptr<Tokenizer> Share() const override { return std::make_unique<ByteTokenizer>(); }
};

// The first file that says which text the end token is.
absl::StatusOr<EndToken> ReadEndToken(const TokenizerFiles& files, const std::string& place) {
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const auto file = files.find(name);
    if (file == files.end()) continue;
    KRAIT_ASSIGN_OR_RETURN(const nlohmann::json json,
                           ParsePythonJson(file->second, place + "/" + name, ExitCode::kData));
    if (!json.is_object() || !json.contains("eos_token")) continue;
    const nlohmann::json& token = json["eos_token"];
    if (token.is_null()) continue;
    const bool object = token.is_object() && token.contains("content");
    const nlohmann::json& text = object ? token["content"] : token;
    if (!text.is_string()) {
      return Error(ExitCode::kData, place + "/" + name +
                                        ": eos_token is neither a string nor an "
                                        "object with a string \"content\"");
    }
    return EndToken{text.get<std::string>(), name};
  }
  return EndToken();
}

// Whether tokenizer_config.json leaves the start token of a SentencePiece model in its place.
absl::StatusOr<bool> ReadAddStart(const TokenizerFiles& files, const std::string& place) {
  const auto file = files.find("tokenizer_config.json");
  if (file == files.end()) return true;
  const std::string path = place + "/tokenizer_config.json";
  KRAIT_ASSIGN_OR_RETURN(const nlohmann::json json,
                         ParsePythonJson(file->second, path, ExitCode::kData));
  if (!json.is_object() || !json.contains("add_bos_token")) return true;
  const nlohmann::json& value = json["add_bos_token"];
  if (value.is_null()) return true;
  if (value.is_boolean()) return value.get<bool>();
  return Error(ExitCode::kData, path + ": add_bos_token is neither true nor false");
}

absl::Status NoTokenizer(const std::string& path, const std::string& why) {
  return Error(ExitCode::kConfig, absl::StrFormat("tokenizer %s: %s; \"bytes\", a Hugging Face "
                                                  "tokenizer.json or a SentencePiece .model is "
                                                  "needed",
                                                  path, why));
}

}  // namespace

std::string TokenizerHash(std::string_view content) {
  ContentHash hash;
  hash.AddTokens(content.data(), content.size());
  return hash.Finish("", 0);
}

std::string TextDecoder::Next(int32_t id) {
  std::string text = tokenizer_.Decode(id, at_start_);
  at_start_ = at_start_ && tokenizer_.Decode(id, /*at_start=*/false).empty();
  return text;
}

std::string DecodeAll(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  TextDecoder decoder(tokenizer);
  std::string text;
  for (const int32_t id : ids) text += decoder.Next(id);
  return text;
}

bool IsTokenizerFile(const std::string& name) {
  return name == kJsonFile || name == kModelFile ||
         std::find(kCompanions.begin(), kCompanions.end(), name) != kCompanions.end();
}

absl::StatusOr<TokenizerFiles> ReadTokenizerFiles(const std::string& name_or_path) {
  TokenizerFiles files;
  if (name_or_path == "bytes") return files;
  if (name_or_path.empty() || !Exists(name_or_path)) {
    return NoTokenizer(name_or_path, "there is no such file");
  }
  std::string folder = name_or_path;
  if (!IsDirectory(name_or_path)) {
    folder = ParentFolder(name_or_path);
    std::string content;
    KRAIT_ASSIGN_OR_RETURN(content, ReadFile(name_or_path, kMaxFile, ExitCode::kData));
    // A SentencePiece model begins with the tag of its first message; JSON cannot.
    const size_t first = content.find_first_not_of(" \t\r\n");
    const bool json = first != std::string::npos && content[first] == '{';
    if (!json && !content.starts_with('\n')) {
      return NoTokenizer(name_or_path, "it is neither of the files that are read");
    }
    files[json ? kJsonFile : kModelFile] = std::move(content);
  } else {
    for (const char* name : {kJsonFile, kModelFile}) {
      const std::string path = folder + "/" + name;
      if (!Exists(path)) continue;
      KRAIT_ASSIGN_OR_RETURN(files[name], ReadFile(path, kMaxFile, ExitCode::kData));
    }
    if (files.empty()) {
      return NoTokenizer(name_or_path, "it is a folder without tokenizer.json or tokenizer.model");
    }
  }
  for (const char* name : kCompanions) {
    const std::string path = folder + "/" + name;
    if (!Exists(path) || IsDirectory(path)) continue;
    KRAIT_ASSIGN_OR_RETURN(files[name], ReadFile(path, kMaxFile, ExitCode::kData));
  }
  return files;
}

absl::Status WriteTokenizerFiles(const TokenizerFiles& files, const std::string& folder,
                                 ExitCode code) {
  KRAIT_RETURN_IF_ERROR(MakeDirectories(folder, code));
  for (const auto& [name, content] : files) {
    KRAIT_RETURN_IF_ERROR(WriteFileAtomic(folder + "/" + name, content, code));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(const TokenizerFiles& files,
                                                         const std::string& place) {
  if (files.empty()) return std::unique_ptr<Tokenizer>(std::make_unique<ByteTokenizer>());
  const std::string folder = IsDirectory(place) ? place : ParentFolder(place);
  KRAIT_ASSIGN_OR_RETURN(const EndToken end, ReadEndToken(files, folder));
  if (const auto json = files.find(kJsonFile); json != files.end()) {
    return MakeBpeTokenizer(json->second, end,
                            IsDirectory(place) ? place + "/" + kJsonFile : place);
  }
  if (const auto model = files.find(kModelFile); model != files.end()) {
    KRAIT_ASSIGN_OR_RETURN(const bool add_start, ReadAddStart(files, folder));
    return MakeSentencePieceTokenizer(model->second, end, add_start,
                                      IsDirectory(place) ? place + "/" + kModelFile : place);
  }
  return NoTokenizer(place, "there is neither of the files that are read");
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(const std::string& name_or_path) {
  KRAIT_ASSIGN_OR_RETURN(const TokenizerFiles files, ReadTokenizerFiles(name_or_path));
  return MakeTokenizer(files, name_or_path);
}

}  // namespace krait
