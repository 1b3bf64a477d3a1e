#include "data/inspect.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_format.h"
#include "data/token_file.h"
#include "data/tokenizer.h"
#include "kernels/base/number.h"
#include "nlohmann/json.hpp"

namespace krait {
namespace {

constexpr int64_t kPreviewTokens = 100;

// The text of ids, where the file holds its tokenizer.
std::string Preview(const TokenFile& file, const std::vector<int32_t>& ids) {
  const auto files = file.ReadTokenizerFiles();
  if (!files.ok() || (files->empty() && file.tokenizer() != "bytes")) return "";
  const auto tokenizer = MakeTokenizer(*files, file.path());
  return tokenizer.ok() ? DecodeAll(**tokenizer, ids) : "";
}

}  // namespace

absl::StatusOr<TokenFileSummary> InspectTokenFile(const std::string& path, bool verify) {
  std::unique_ptr<TokenFile> file;
  KRAIT_ASSIGN_OR_RETURN(file, TokenFile::Open(path));
  TokenFileSummary summary;
  summary.path = path;
  summary.format = file->format();
  summary.tokenizer = file->tokenizer();
  summary.end_token = file->end_token();
  summary.tokens_per_byte = file->tokens_per_byte();
  summary.content_hash = file->content_hash();
  summary.dtype = file->dtype();
  summary.tokens = file->tokens();
  summary.documents = file->documents();
  summary.vocab_size = file->vocab_size();
  summary.mean_document =
      static_cast<double>(summary.tokens) / static_cast<double>(summary.documents);
  summary.shortest_document = summary.tokens;
  int64_t first_end = 0, before = 0;  // of the first document; the entry before
  KRAIT_RETURN_IF_ERROR(
      file->document_table().ForEachPiece([&](const std::vector<uint64_t>& entries) {
        for (const uint64_t entry : entries) {
          const auto start = static_cast<int64_t>(entry);
          if (start == 0) continue;
          if (first_end == 0) first_end = start;
          summary.shortest_document = std::min(summary.shortest_document, start - before);
          summary.longest_document = std::max(summary.longest_document, start - before);
          before = start;
        }
        return true;
      }));
  std::vector<int32_t> ids(static_cast<size_t>(std::min(kPreviewTokens, first_end)));
  summary.damage = file->Read(0, static_cast<int64_t>(ids.size()), ids.data());
  if (summary.damage.ok()) summary.preview = Preview(*file, ids);
  if (verify) {
    summary.verified = true;
    summary.damage = file->Verify();
  }
  return summary;
}

std::string TokenFileSummary::ToText() const {
  std::string text = path + "\n";
  absl::StrAppendFormat(&text, "  tokens        %s (%s)\n", PrintGrouped(tokens), Name(dtype));
  absl::StrAppendFormat(&text, "  documents     %s (%s to %s tokens, mean %.1f)\n",
                        PrintGrouped(documents), PrintGrouped(shortest_document),
                        PrintGrouped(longest_document), mean_document);
  if (format != "Krait") absl::StrAppendFormat(&text, "  format        %s\n", format);
  absl::StrAppendFormat(&text, "  tokenizer     %s (vocabulary %s)\n",
                        tokenizer.empty() ? "not known" : tokenizer,
                        vocab_size > 0 ? PrintGrouped(vocab_size) : "not known");
  if (end_token.has_value()) absl::StrAppendFormat(&text, "  end token     %d\n", *end_token);
  if (tokens_per_byte.has_value() && tokenizer != "bytes") {
    absl::StrAppendFormat(&text, "  text          %.2f bytes per token\n", 1 / *tokens_per_byte);
  }
  absl::StrAppendFormat(&text, "  content hash  %s\n", content_hash);
  if (!preview.empty()) {
    absl::StrAppendFormat(&text, "  begins        \"%s\"\n", absl::Utf8SafeCEscape(preview));
  }
  if (!damage.ok()) {
    absl::StrAppendFormat(&text, "  damaged       %s\n", MessageOf(damage));
  } else if (verified) {
    text += format == "Krait" ? "  verified      the content has this hash\n"
                              : "  verified      all ids can be read (the format keeps no hash)\n";
  } else {
    text += "  not verified  ask for it with --verify\n";
  }
  return text;
}

std::string TokenFileSummary::ToJson() const {
  nlohmann::ordered_json json = {{"path", path},
                                 {"tokens", tokens},
                                 {"documents", documents},
                                 {"shortest_document", shortest_document},
                                 {"longest_document", longest_document},
                                 {"mean_document", mean_document},
                                 {"format", format},
                                 {"tokenizer", tokenizer},
                                 {"vocab_size", vocab_size},
                                 {"dtype", Name(dtype)},
                                 {"content_hash", content_hash},
                                 {"preview", preview},
                                 {"verified", verified && damage.ok()}};
  if (end_token.has_value()) json["end_token"] = *end_token;
  if (tokens_per_byte.has_value()) json["tokens_per_byte"] = *tokens_per_byte;
  if (!damage.ok()) json["damage"] = MessageOf(damage);
  // A preview may end inside a UTF-8 character, or be no UTF-8 at all.
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace krait
