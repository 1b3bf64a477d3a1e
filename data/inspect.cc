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

}  // namespace

absl::StatusOr<TokenFileSummary> InspectTokenFile(const std::string& path, bool verify) {
  std::unique_ptr<TokenFile> file;
  KRAIT_ASSIGN_OR_RETURN(file, TokenFile::Open(path));
  TokenFileSummary summary;
  summary.path = path;
  summary.tokenizer = file->tokenizer();
  summary.content_hash = file->content_hash();
  summary.dtype = file->dtype();
  summary.tokens = file->tokens();
  summary.documents = file->documents();
  summary.vocab_size = file->vocab_size();
  summary.mean_document =
      static_cast<double>(summary.tokens) / static_cast<double>(summary.documents);
  const std::vector<uint64_t>& starts = file->document_starts();
  summary.shortest_document = summary.tokens;
  for (size_t i = 1; i < starts.size(); ++i) {
    const auto length = static_cast<int64_t>(starts[i] - starts[i - 1]);
    summary.shortest_document = std::min(summary.shortest_document, length);
    summary.longest_document = std::max(summary.longest_document, length);
  }
  std::vector<int32_t> ids(
      static_cast<size_t>(std::min(kPreviewTokens, static_cast<int64_t>(starts[1]))));
  summary.damage = file->Read(0, static_cast<int64_t>(ids.size()), ids.data());
  const auto tokenizer = MakeTokenizer(file->tokenizer());
  if (summary.damage.ok() && tokenizer.ok()) {
    summary.preview = DecodeAll(**tokenizer, ids);
  }
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
  absl::StrAppendFormat(&text, "  tokenizer     %s (vocabulary %s)\n", tokenizer,
                        PrintGrouped(vocab_size));
  absl::StrAppendFormat(&text, "  content hash  %s\n", content_hash);
  if (!preview.empty()) {
    absl::StrAppendFormat(&text, "  begins        \"%s\"\n", absl::Utf8SafeCEscape(preview));
  }
  if (!damage.ok()) {
    absl::StrAppendFormat(&text, "  damaged       %s\n", MessageOf(damage));
  } else if (verified) {
    text += "  verified      the content has this hash\n";
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
                                 {"tokenizer", tokenizer},
                                 {"vocab_size", vocab_size},
                                 {"dtype", Name(dtype)},
                                 {"content_hash", content_hash},
                                 {"preview", preview},
                                 {"verified", verified && damage.ok()}};
  if (!damage.ok()) json["damage"] = MessageOf(damage);
  // A preview may end inside a UTF-8 character, or be no UTF-8 at all.
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace krait
