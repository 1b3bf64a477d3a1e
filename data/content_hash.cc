#include "data/content_hash.h"

#include <zlib.h>

#include "absl/strings/str_format.h"
#include "kernels/base/crc32c.h"

namespace krait {

void ContentHash::Add(const void* data, size_t size) {
  if (size == 0) return;  // zlib takes a null pointer as the wish to start over
  crc32c_ = Crc32c(data, size, crc32c_);
  crc32_ = static_cast<uint32_t>(crc32_z(crc32_, static_cast<const Bytef*>(data), size));
}

void ContentHash::AddTokens(const void* data, size_t size) { Add(data, size); }

void ContentHash::AddDocuments(const std::vector<uint64_t>& entries) {
  Add(entries.data(), entries.size() * sizeof(uint64_t));
}

std::string ContentHash::Finish(std::string_view tokenizer, uint64_t vocab_size) {
  Add(tokenizer.data(), tokenizer.size());
  Add("", 1);
  Add(&vocab_size, sizeof(vocab_size));
  return absl::StrFormat("%08x%08x", crc32c_, crc32_);
}

}  // namespace krait
