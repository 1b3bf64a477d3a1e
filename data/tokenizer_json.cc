// Hugging Face tokenizer.json files (tokenizer.h).
#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "data/added_tokens.h"
#include "data/bpe.h"
#include "data/byte_alphabet.h"
#include "data/json_node.h"
#include "data/text_steps.h"
#include "data/tokenizer_kinds.h"
#include "kernels/base/json.h"
#include "kernels/base/utf8.h"

namespace krait {
namespace {

constexpr int32_t kMaxId = int32_t{1} << 22;

// How tokens become text again.
struct Decoding {
  std::vector<std::string> at_start, later;  // by id
};

// What does not change, shared by the threads' tokenizers.
struct BpeParts {
  std::shared_ptr<const BpeVocabulary> vocabulary;
  AddedTokenFinder raw, normalized;
  Decoding decoding;
  bool any_normalized = false;
};

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(std::shared_ptr<const BpeParts> parts, TextSteps steps)
      : parts_(std::move(parts)), steps_(std::move(steps)), encoder_(parts_->vocabulary) {}

  void Describe(std::string name, int64_t vocab_size, std::optional<int32_t> end,
                std::vector<int32_t> prefix, std::vector<int32_t> suffix) {
    name_ = std::move(name);
    vocab_size_ = vocab_size;
    end_token_ = end;
    prefix_ = std::move(prefix);
    suffix_ = std::move(suffix);
  }

  absl::Status Encode(std::string_view text, std::vector<int32_t>* ids) override {
    // Bytes that are no UTF-8 are words of their own.
    for (size_t begin = 0; begin < text.size();) {
      size_t end = begin;
      while (end < text.size()) {
        const size_t length = Utf8Length(text, end);
        if (length == 0) break;
        end += length;
      }
      if (end > begin) {
        KRAIT_RETURN_IF_ERROR(EncodeUtf8(text.substr(begin, end - begin), begin == 0, ids));
      }
      begin = end;
      while (end < text.size() && Utf8Length(text, end) == 0) ++end;
      KRAIT_RETURN_IF_ERROR(EncodeWord(text.substr(begin, end - begin), ids));
      begin = end;
    }
    return absl::OkStatus();
  }

  std::string Decode(int32_t id, bool at_start) const override {
    const std::vector<std::string>& texts =
        at_start ? parts_->decoding.at_start : parts_->decoding.later;
    const auto index = static_cast<size_t>(id);
    return id >= 0 && index < texts.size() ? texts[index] : std::string();
  }

  std::unique_ptr<Tokenizer> Share() const override {
    auto shared = std::make_unique<BpeTokenizer>(parts_, steps_.Share());
    shared->Describe(name_, vocab_size_, end_token_, prefix_, suffix_);
    return shared;
  }

 private:
  absl::Status EncodeUtf8(std::string_view text, bool at_start, std::vector<int32_t>* ids) {
    absl::Status status;
    const auto token = [&](int32_t id) { ids->push_back(id); };
    parts_->raw.Cut(
        text,
        [&](std::string_view piece) {
          if (!status.ok()) return;
          status = EncodePiece(piece, at_start && piece.data() == text.data(), ids);
        },
        token);
    return status;
  }

  absl::Status EncodePiece(std::string_view piece, bool at_start, std::vector<int32_t>* ids) {
    std::string changed;
    if (steps_.normalizes()) {
      KRAIT_ASSIGN_OR_RETURN(changed, steps_.Normalize(piece));
      piece = changed;
    }
    const auto word = [&](std::string_view text) { return EncodeWord(text, ids); };
    if (!parts_->any_normalized) return steps_.Cut(piece, at_start, word);
    absl::Status status;
    parts_->normalized.Cut(
        piece,
        [&](std::string_view part) {
          if (!status.ok()) return;
          status = steps_.Cut(part, at_start && part.data() == piece.data(), word);
        },
        [&](int32_t id) { ids->push_back(id); });
    return status;
  }

  absl::Status EncodeWord(std::string_view word, std::vector<int32_t>* ids) {
    const int bad = encoder_.Encode(word, ids);
    if (bad < 0) return absl::OkStatus();
    return Error(ExitCode::kData,
                 absl::StrFormat("the tokenizer has no token for the byte 0x%02X", bad));
  }

  std::shared_ptr<const BpeParts> parts_;
  TextSteps steps_;
  BpeEncoder encoder_;
};

// Reads one file.
class Reader {
 public:
  Reader(const nlohmann::json& json, std::string place, EndToken end)
      : root_{&json, std::move(place)}, end_(std::move(end)) {}

  absl::StatusOr<std::unique_ptr<Tokenizer>> Read() {
    KRAIT_RETURN_IF_ERROR(root_.CheckObject());
    KRAIT_RETURN_IF_ERROR(CheckModel());
    KRAIT_ASSIGN_OR_RETURN(
        TextSteps steps,
        TextSteps::Read(*root_["normalizer"].value, *root_["pre_tokenizer"].value, root_.place));
    byte_level_ = steps.byte_level();
    KRAIT_RETURN_IF_ERROR(ReadVocabulary());
    KRAIT_RETURN_IF_ERROR(ReadAddedTokens(&steps));
    KRAIT_RETURN_IF_ERROR(ReadMerges());
    KRAIT_RETURN_IF_ERROR(ReadDecoder(root_["decoder"]));
    std::vector<int32_t> prefix, suffix;
    KRAIT_RETURN_IF_ERROR(ReadTemplate(root_["post_processor"], &prefix, &suffix));
    KRAIT_ASSIGN_OR_RETURN(const std::optional<int32_t> end, FindEnd());
    const auto vocab_size = static_cast<int64_t>(parts_->decoding.later.size());
    auto tokenizer = std::make_unique<BpeTokenizer>(parts_, std::move(steps));
    tokenizer->Describe("bpe-" + Hash(), vocab_size, end, std::move(prefix), std::move(suffix));
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
  }

 private:
  absl::Status CheckModel() {
    const JsonNode model = root_["model"];
    KRAIT_RETURN_IF_ERROR(model.CheckObject());
    if (!model["type"].IsNull() || !model.value->contains("merges")) {
      KRAIT_ASSIGN_OR_RETURN(const std::string type, model["type"].String());
      if (type == "Unigram") {
        return model.Unsupported(
            "the model \"Unigram\" (where there is a SentencePiece model, name that)");
      }
      if (type != "BPE") return model.Unsupported("the model \"" + type + "\"");
    }
    KRAIT_RETURN_IF_ERROR(model.CheckKeys(
        {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
         "byte_fallback", "ignore_merges", "vocab", "merges", "max_input_chars_per_word"}));
    const nlohmann::json& dropout = *model["dropout"].value;
    if (!dropout.is_null() && dropout != 0.0) return model["dropout"].Unsupported("a dropout");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      const nlohmann::json& value = *model[key].value;
      if (!value.is_null() && value != "") return model[key].Unsupported("a value");
    }
    KRAIT_ASSIGN_OR_RETURN(byte_fallback_, model["byte_fallback"].Bool(false));
    KRAIT_ASSIGN_OR_RETURN(ignore_merges_, model["ignore_merges"].Bool(false));
    return absl::OkStatus();
  }

  absl::Status ReadVocabulary() {
    const JsonNode vocab = root_["model"]["vocab"];
    KRAIT_RETURN_IF_ERROR(vocab.CheckObject());
    for (const auto& [token, id_value] : vocab.value->items()) {
      KRAIT_ASSIGN_OR_RETURN(const int32_t id,
                             (JsonNode{&id_value, vocab.place + "[\"" + token + "\"]"}.Id()));
      KRAIT_RETURN_IF_ERROR(Claim(id, token, vocab.place));
    }
    // Bytes of a token, for the search of words and for text.
    tokens_.resize(texts_.size());
    decoding_ = texts_;
    for (size_t id = 0; id < texts_.size(); ++id) {
      if (!byte_level_) {
        tokens_[id] = texts_[id];
      } else if (const auto bytes = alphabet_.Bytes(texts_[id]); bytes.has_value()) {
        tokens_[id] = decoding_[id] = *bytes;
      }
    }
    if (!byte_level_ && !byte_fallback_) {
      return root_["model"].Unsupported(
          "a BPE of characters without byte_fallback, which loses those that it does not know,");
    }
    for (size_t byte = 0; byte < 256; ++byte) {
      const std::string name =
          byte_level_ ? alphabet_.character(byte) : absl::StrFormat("<0x%02X>", byte);
      const auto found = ids_.find(name);
      byte_tokens_[byte] = found == ids_.end() ? -1 : found->second;
      if (byte_level_) continue;
      if (found == ids_.end()) return vocab.Wrong(("a vocabulary with the token " + name).c_str());
      decoding_[static_cast<size_t>(found->second)] = std::string(1, static_cast<char>(byte));
    }
    return absl::OkStatus();
  }

  // Notes that `id` is the token `text`.
  absl::Status Claim(int32_t id, const std::string& text, const std::string& place) {
    if (id >= kMaxId) {
      return Error(ExitCode::kData,
                   absl::StrFormat("%s: the id %d is above %d", place, id, kMaxId - 1));
    }
    const auto index = static_cast<size_t>(id);
    if (index >= texts_.size()) {
      texts_.resize(index + 1);
      taken_.resize(index + 1);
    }
    if (taken_[index] && texts_[index] != text) {
      return Error(ExitCode::kData, absl::StrFormat("%s: the id %d is that of two tokens, \"%s\" "
                                                    "and \"%s\"",
                                                    place, id, texts_[index], text));
    }
    taken_[index] = true;
    texts_[index] = text;
    ids_[text] = id;
    return absl::OkStatus();
  }

  absl::Status ReadAddedTokens(TextSteps* steps) {
    const JsonNode list = root_["added_tokens"];
    if (list.IsNull()) return absl::OkStatus();
    KRAIT_RETURN_IF_ERROR(list.CheckArray());
    std::vector<AddedToken> raw, normalized;
    for (size_t i = 0; i < list.value->size(); ++i) {
      const JsonNode node = list.At(i);
      KRAIT_RETURN_IF_ERROR(node.CheckKeys(
          {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}));
      AddedToken token;
      KRAIT_ASSIGN_OR_RETURN(token.id, node["id"].Id());
      KRAIT_ASSIGN_OR_RETURN(token.content, node["content"].String());
      KRAIT_ASSIGN_OR_RETURN(token.lstrip, node["lstrip"].Bool(false));
      KRAIT_ASSIGN_OR_RETURN(token.rstrip, node["rstrip"].Bool(false));
      KRAIT_ASSIGN_OR_RETURN(token.special, node["special"].Bool(false));
      KRAIT_ASSIGN_OR_RETURN(token.normalized, node["normalized"].Bool(!token.special));
      KRAIT_ASSIGN_OR_RETURN(const bool single_word, node["single_word"].Bool(false));
      if (single_word) return node["single_word"].Unsupported("true");
      if (token.content.empty()) return node["content"].Wrong("a text");
      const auto known = ids_.find(token.content);
      if (known != ids_.end() && known->second != token.id) {
        return Error(ExitCode::kData,
                     absl::StrFormat("%s: \"%s\" has the id %d here and %d in the vocabulary",
                                     node.place, token.content, token.id, known->second));
      }
      KRAIT_RETURN_IF_ERROR(Claim(token.id, token.content, node.place));
      decoding_.resize(texts_.size());
      tokens_.resize(texts_.size());
      decoding_[static_cast<size_t>(token.id)] = token.content;
      if (token.special) special_.push_back(token);
      added_.push_back(token);
      if (!token.normalized) {
        raw.push_back(token);
        continue;
      }
      KRAIT_ASSIGN_OR_RETURN(token.content, steps->Normalize(token.content));
      if (!token.content.empty()) normalized.push_back(token);
    }
    parts_->raw = AddedTokenFinder(raw);
    parts_->normalized = AddedTokenFinder(normalized);
    parts_->any_normalized = !normalized.empty();
    return absl::OkStatus();
  }

  absl::Status ReadMerges() {
    const JsonNode list = root_["model"]["merges"];
    KRAIT_RETURN_IF_ERROR(list.CheckArray());
    std::vector<std::pair<std::string, std::string>> merges;
    merges.reserve(list.value->size());
    for (const nlohmann::json& merge : *list.value) {
      std::pair<std::string, std::string> parts;
      const bool pair =
          merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
      if (pair) {
        parts = {merge[0].get<std::string>(), merge[1].get<std::string>()};
      } else {
        const std::string text = merge.is_string() ? merge.get<std::string>() : "";
        const size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
          return list.At(merges.size()).Wrong("a pair of tokens (\"a b\" or [\"a\", \"b\"])");
        }
        parts = {text.substr(0, space), text.substr(space + 1)};
      }
      canonical_ += parts.first + '\n' + parts.second + '\n';
      if (byte_level_) {
        parts = {alphabet_.Bytes(parts.first).value_or(""),
                 alphabet_.Bytes(parts.second).value_or("")};
      }
      merges.push_back(std::move(parts));
    }
    KRAIT_ASSIGN_OR_RETURN(
        parts_->vocabulary,
        BpeVocabulary::Create(tokens_, byte_tokens_, merges,
                              {.byte_level = byte_level_, .ignore_merges = ignore_merges_},
                              list.place));
    return absl::OkStatus();
  }

  // Of a BPE of bytes, ByteLevel; of characters, what turns the sign for a space back.
  absl::Status ReadDecoder(const JsonNode& node) {
    parts_->decoding = {decoding_, decoding_};
    if (node.IsNull() && byte_level_) return absl::OkStatus();
    KRAIT_RETURN_IF_ERROR(node.CheckObject());
    KRAIT_ASSIGN_OR_RETURN(const std::string type, node["type"].String());
    if (type == "Sequence") {
      const JsonNode list = node["decoders"];
      KRAIT_RETURN_IF_ERROR(list.CheckArray());
      bool fused = false;
      for (size_t i = 0; i < list.value->size(); ++i) {
        KRAIT_RETURN_IF_ERROR(AddDecoder(list.At(i), &fused));
      }
      return absl::OkStatus();
    }
    bool fused = false;
    return AddDecoder(node, &fused);
  }

  absl::Status AddDecoder(const JsonNode& node, bool* fused) {
    KRAIT_ASSIGN_OR_RETURN(const std::string type, node["type"].String());
    if (type == "Fuse" || type == "ByteFallback") {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({}));
      *fused = *fused || type == "Fuse";
      return absl::OkStatus();
    }
    if (type == "ByteLevel" && byte_level_) return absl::OkStatus();
    if (type == "Replace" && !byte_level_ && !*fused) {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({"pattern", "content"}));
      KRAIT_ASSIGN_OR_RETURN(const std::string from, node["pattern"]["String"].String());
      KRAIT_ASSIGN_OR_RETURN(const std::string to, node["content"].String());
      if (from.empty()) return node["pattern"].Unsupported("an empty pattern");
      ReplaceInTexts(from, to, &parts_->decoding.later);
      parts_->decoding.at_start = parts_->decoding.later;
      return absl::OkStatus();
    }
    if (type == "Metaspace" && !byte_level_) {
      KRAIT_ASSIGN_OR_RETURN(const std::string sign, node["replacement"].String());
      if (sign.empty()) return node["replacement"].Wrong("one character");
      const nlohmann::json& scheme = *node["prepend_scheme"].value;
      KRAIT_ASSIGN_OR_RETURN(const bool space, node["add_prefix_space"].Bool(true));
      ReplaceInTexts(sign, " ", &parts_->decoding.later);
      ReplaceInTexts(sign, space && scheme != "never" ? "" : " ", &parts_->decoding.at_start);
      return absl::OkStatus();
    }
    if (type == "Strip" && *fused) {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({"content", "start", "stop"}));
      if (*node["content"].value != " " || *node["stop"].value != 0 ||
          (*node["start"].value != 0 && *node["start"].value != 1)) {
        return node.Unsupported("a Strip of other than one space at the start");
      }
      if (*node["start"].value == 0) return absl::OkStatus();
      for (std::string& text : parts_->decoding.at_start) {
        if (text.starts_with(' ')) text.erase(0, 1);
      }
      return absl::OkStatus();
    }
    return node.Unsupported("the decoder \"" + type + "\"");
  }

  // Bytes that stand for themselves are no text.
  void ReplaceInTexts(const std::string& from, const std::string& to,
                      std::vector<std::string>* texts) {
    for (std::string& text : *texts) absl::StrReplaceAll({{from, to}}, &text);
  }

  absl::Status ReadTemplate(const JsonNode& node, std::vector<int32_t>* prefix,
                            std::vector<int32_t>* suffix) {
    if (node.IsNull()) return absl::OkStatus();
    KRAIT_RETURN_IF_ERROR(node.CheckObject());
    KRAIT_ASSIGN_OR_RETURN(const std::string type, node["type"].String());
    if (type == "ByteLevel") return absl::OkStatus();  // it moves offsets, no ids
    if (type == "Sequence") {
      const JsonNode list = node["processors"];
      KRAIT_RETURN_IF_ERROR(list.CheckArray());
      bool any = false;
      for (size_t i = 0; i < list.value->size(); ++i) {
        const nlohmann::json& inner = *list.At(i)["type"].value;
        if (inner == "Sequence" || (inner == "TemplateProcessing" && any)) {
          return list.At(i).Unsupported("a second one");
        }
        any = any || inner == "TemplateProcessing";
        KRAIT_RETURN_IF_ERROR(ReadTemplate(list.At(i), prefix, suffix));
      }
      return absl::OkStatus();
    }
    if (type != "TemplateProcessing") {
      return node.Unsupported("the post-processor \"" + type + "\"");
    }
    const JsonNode single = node["single"];
    KRAIT_RETURN_IF_ERROR(single.CheckArray());
    bool seen = false;
    for (size_t i = 0; i < single.value->size(); ++i) {
      const JsonNode piece = single.At(i);
      KRAIT_RETURN_IF_ERROR(piece.CheckObject());
      if (piece.value->contains("Sequence")) {
        if (seen) return piece.Unsupported("a second text");
        seen = true;
        continue;
      }
      KRAIT_ASSIGN_OR_RETURN(const std::string name, piece["SpecialToken"]["id"].String());
      const JsonNode ids = node["special_tokens"][name.c_str()]["ids"];
      KRAIT_RETURN_IF_ERROR(ids.CheckArray());
      for (size_t k = 0; k < ids.value->size(); ++k) {
        KRAIT_ASSIGN_OR_RETURN(const int32_t id, ids.At(k).Id());
        if (static_cast<size_t>(id) >= texts_.size()) return ids.At(k).Wrong("a known id");
        (seen ? suffix : prefix)->push_back(id);
      }
    }
    return seen ? absl::OkStatus() : single.Wrong("a place for the text");
  }

  absl::StatusOr<std::optional<int32_t>> FindEnd() {
    if (!end_.text.empty()) {
      const auto found = ids_.find(end_.text);
      if (found != ids_.end()) return found->second;
      return Error(ExitCode::kData, absl::StrFormat("%s: the end token \"%s\" that %s names is no "
                                                    "token of it",
                                                    root_.place, end_.text, end_.said_by));
    }
    for (const char* usual : {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"}) {
      for (const AddedToken& token : special_) {
        if (token.content == usual) return token.id;
      }
    }
    return std::nullopt;
  }

  // Of what decides the ids of a text, however the file is laid out.
  std::string Hash() {
    for (const std::string& text : texts_) canonical_ += text + '\n';
    for (const AddedToken& token : added_) {
      absl::StrAppendFormat(&canonical_, "%d %s %d%d%d\n", token.id, token.content, token.lstrip,
                            token.rstrip, token.normalized);
    }
    absl::StrAppendFormat(&canonical_, "%d%d\n", byte_fallback_, ignore_merges_);
    canonical_ += root_["normalizer"].value->dump() + '\n' + root_["pre_tokenizer"].value->dump();
    return TokenizerHash(canonical_);
  }

  JsonNode root_;
  EndToken end_;
  ByteAlphabet alphabet_;
  bool byte_level_ = false, byte_fallback_ = false, ignore_merges_ = false;
  std::vector<std::string> texts_;  // by id, as the file has them
  std::vector<bool> taken_;
  std::vector<std::string> tokens_;  // by id, the bytes that words are made of; "": not to be found
  std::vector<std::string> decoding_;  // by id, before the decoder's steps
  absl::flat_hash_map<std::string, int32_t> ids_;
  std::array<int32_t, 256> byte_tokens_{};
  std::vector<AddedToken> added_, special_;
  std::string canonical_;
  std::shared_ptr<BpeParts> parts_ = std::make_shared<BpeParts>();
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(std::string_view json,
                                                            const EndToken& end,
                                                            const std::string& place) {
  KRAIT_ASSIGN_OR_RETURN(const nlohmann::json parsed, ParseJson(json, place, ExitCode::kData));
  return Reader(parsed, place + ":", end).Read();
}

}  // namespace krait
