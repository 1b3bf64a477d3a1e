#include "kernels/base/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace krait {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;  // 0x1EDC6F41 with its bits reversed

constexpr std::array<uint32_t, 256> MakeTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ kPolynomial : crc >> 1;
    table[i] = crc;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kTable = MakeTable();

constexpr uint32_t Software(uint32_t crc, const unsigned char* p, size_t size) {
  for (size_t i = 0; i < size; ++i) crc = kTable[(crc ^ p[i]) & 0xFF] ^ crc >> 8;
  return crc;
}
constexpr unsigned char kCheckText[] = {'1', '2', '3', '4', '5', '6', '7', '8', '9'};
static_assert(~Software(~0u, kCheckText, 9) == 0xE3069283u);

#if defined(__x86_64__)

// x^n modulo the polynomial, bit 31 being x^0.
constexpr uint32_t PowerOfX(int n) {
  uint32_t value = 0x80000000u;
  for (int i = 0; i < n; ++i) value = value & 1 ? value >> 1 ^ kPolynomial : value >> 1;
  return value;
}

// The crc32 instruction has a latency of 3 cycles and starts one per cycle: three lanes of kLane
// bytes run side by side. A lane's CRC is moved over the `bytes` that follow it by a carry-less
// product with x^(8*bytes - 33): the product of two bit-reversed 32-bit values carries one factor
// x, and reducing it with the crc32 instruction multiplies by x^32.
constexpr size_t kLane = 1024;
constexpr uint32_t kSkipOne = PowerOfX(8 * kLane - 33);
constexpr uint32_t kSkipTwo = PowerOfX(16 * kLane - 33);

inline uint64_t Load64(const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}

__attribute__((target("sse4.2,pclmul"))) uint64_t Skip(uint64_t crc, uint32_t factor) {
  const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<int64_t>(crc)),
                                               _mm_cvtsi64_si128(factor), 0);
  return _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(product)));
}

__attribute__((target("sse4.2,pclmul"))) uint32_t Hardware(uint32_t crc, const unsigned char* p,
                                                           size_t size) {
  uint64_t a = crc;
  for (; size >= 3 * kLane; size -= 3 * kLane, p += 3 * kLane) {
    uint64_t b = 0, c = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      a = _mm_crc32_u64(a, Load64(p + i));
      b = _mm_crc32_u64(b, Load64(p + kLane + i));
      c = _mm_crc32_u64(c, Load64(p + 2 * kLane + i));
    }
    a = Skip(a, kSkipTwo) ^ Skip(b, kSkipOne) ^ c;
  }
  for (; size >= 8; size -= 8, p += 8) a = _mm_crc32_u64(a, Load64(p));
  crc = static_cast<uint32_t>(a);
  for (; size > 0; --size, ++p) crc = _mm_crc32_u8(crc, *p);
  return crc;
}
#endif

}  // namespace

uint32_t Crc32c(const void* data, size_t size, uint32_t crc) {
  const auto* p = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul")) {
    return ~Hardware(~crc, p, size);
  }
#endif
  return ~Software(~crc, p, size);
}

}  // namespace krait
