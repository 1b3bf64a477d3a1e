// What `krait data inspect` shows of a token file.
#ifndef KRAIT_DATA_INSPECT_H_
#define KRAIT_DATA_INSPECT_H_

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace krait {

struct TokenFileSummary {
  std::string path, format, content_hash;
  std::string tokenizer;  // "": not known
  DType dtype = DType::kU8;
  int64_t tokens = 0, documents = 0;
  int64_t vocab_size = 0;  // 0: not known
  std::optional<int64_t> end_token;
  std::optional<double> tokens_per_byte;
  int64_t shortest_document = 0, longest_document = 0;  // in tokens
  double mean_document = 0;
  std::string preview;    // the first bytes of the first document; empty for an unknown tokenizer
  bool verified = false;  // the content was read and compared with its hash
  absl::Status damage;    // what that found; OK without it

  std::string ToText() const;  // lines for people, each ended by a newline
  std::string ToJson() const;  // one object, the same facts
};

// kData when the file cannot be opened. With `verify` everything is read; damage is reported in the
// summary, and its exit code is the command's.
absl::StatusOr<TokenFileSummary> InspectTokenFile(const std::string& path, bool verify);

}  // namespace krait

#endif  // KRAIT_DATA_INSPECT_H_
