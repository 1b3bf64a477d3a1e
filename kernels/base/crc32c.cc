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

// Where there are carry-less products of 512 bits, data are folded instead (Gopal et al., "Fast CRC
// computation for generic polynomials using PCLMULQDQ instruction", 2009): 128 bits that have
// `bits` more behind them are replaced by as many at the end of those with the same remainder.
// Their two halves are multiplied by x^(bits + 63) and x^(bits - 1), since, as above, a product
// carries one factor x; the constants lie in the upper halves of 64 bits.
#define KRAIT_WIDE __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))
template <int kBits>
KRAIT_WIDE inline __m512i FoldFactors() {
  constexpr auto kFirst = static_cast<int64_t>(uint64_t{PowerOfX(kBits + 63)} << 32);
  constexpr auto kSecond = static_cast<int64_t>(uint64_t{PowerOfX(kBits - 1)} << 32);
  return _mm512_set_epi64(kSecond, kFirst, kSecond, kFirst, kSecond, kFirst, kSecond, kFirst);
}
KRAIT_WIDE inline __m512i Fold(__m512i data, __m512i factors, __m512i behind) {
  const __m512i first = _mm512_clmulepi64_epi128(data, factors, 0x00);
  const __m512i second = _mm512_clmulepi64_epi128(data, factors, 0x11);
  return _mm512_ternarylogic_epi64(first, second, behind, 0x96);  // the sum
}

constexpr size_t kWide = 256;  // bytes of a step
// At least kWide bytes.
KRAIT_WIDE uint32_t Wide(uint32_t crc, const unsigned char* p, size_t size) {
  __m512i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(p + 64 * i);
  part[0] =
      _mm512_xor_si512(part[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  const __m512i step = FoldFactors<8 * kWide>();
  for (p += kWide, size -= kWide; size >= kWide; p += kWide, size -= kWide) {
    for (int i = 0; i < 4; ++i) part[i] = Fold(part[i], step, _mm512_loadu_si512(p + 64 * i));
  }
  const __m512i next = FoldFactors<512>();
  for (int i = 1; i < 4; ++i) part[i] = Fold(part[i - 1], next, part[i]);
  // What is left are 64 bytes before the rest.
  alignas(64) unsigned char last[64];
  _mm512_store_si512(last, part[3]);
  return Hardware(Hardware(0, last, sizeof(last)), p, size);
}
#undef KRAIT_WIDE
#endif

uint32_t BySoftware(const unsigned char* p, size_t size, uint32_t crc) {
  return ~Software(~crc, p, size);
}
#if defined(__x86_64__)
uint32_t ByHardware(const unsigned char* p, size_t size, uint32_t crc) {
  return ~Hardware(~crc, p, size);
}
uint32_t ByFolding(const unsigned char* p, size_t size, uint32_t crc) {
  return size < kWide ? ByHardware(p, size, crc) : ~Wide(~crc, p, size);
}
#endif

}  // namespace

std::vector<Crc32cWay> Crc32cWays() {
  std::vector<Crc32cWay> ways = {BySoftware};
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("pclmul")) return ways;
  ways.push_back(ByHardware);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) {
    ways.push_back(ByFolding);
  }
#endif
  return ways;
}

uint32_t Crc32c(const void* data, size_t size, uint32_t crc) {
  static const Crc32cWay way = Crc32cWays().back();
  return way(static_cast<const unsigned char*>(data), size, crc);
}

}  // namespace krait
