// The content hash of a token file: a 64-bit CRC, printed as 16 hex digits.
//
// It is the pair (CRC-32C, CRC-32) of the bytes. Their polynomials have no common factor, so by the
// Chinese remainder theorem the pair is the CRC by the product of both: every burst of up to 64
// bits is noticed, other differences are missed once in 2^64. It guards against mix-ups and damage,
// not against forgery. Bytes, in order: /tokens as stored (little-endian), /documents as u64, the
// tokenizer's name, one NUL, vocab_size as u64.
#ifndef KRAIT_DATA_CONTENT_HASH_H_
#define KRAIT_DATA_CONTENT_HASH_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

class ContentHash {
 public:
  // `size` bytes of /tokens, in stored order.
  void AddTokens(const void* data, size_t size);
  // Entries of /documents, likewise.
  void AddDocuments(const std::vector<uint64_t>& entries);
  // The rest; returns the hash.
  std::string Finish(std::string_view tokenizer, uint64_t vocab_size);

 private:
  void Add(const void* data, size_t size);

  uint32_t crc32c_ = 0;
  uint32_t crc32_ = 0;
};

}  // namespace krait

#endif  // KRAIT_DATA_CONTENT_HASH_H_
