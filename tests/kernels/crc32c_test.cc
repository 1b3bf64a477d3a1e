#include "kernels/base/crc32c.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

namespace krait {
namespace {

// The definition, bit by bit.
uint32_t Slow(const std::vector<unsigned char>& data, size_t begin, size_t end) {
  uint32_t crc = ~0u;
  for (size_t i = begin; i < end; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0x82F63B78u : crc >> 1;
  }
  return ~crc;
}

std::vector<unsigned char> Noise(size_t size) {
  std::vector<unsigned char> data(size);
  uint64_t state = 12345;
  for (unsigned char& byte : data) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<unsigned char>(state >> 56);
  }
  return data;
}

TEST(Crc32c, Rfc3720Vectors) {
  // RFC 3720 appendix B.4, and the customary check value.
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\0').data(), 32), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(std::string(32, '\xff').data(), 32), 0x62A8AB43u);
  std::string rising(32, '\0');
  for (int i = 0; i < 32; ++i) rising[static_cast<size_t>(i)] = static_cast<char>(i);
  EXPECT_EQ(Crc32c(rising.data(), 32), 0x46DD794Eu);
  EXPECT_EQ(Crc32c(nullptr, 0), 0u);
}

TEST(Crc32c, EqualsTheDefinitionAtEverySizeAndAlignment) {
  const std::vector<unsigned char> data = Noise(20000);
  // Around the borders of lanes (1024 and 3072 bytes) and of wide steps (256), and unaligned
  // starts.
  const std::vector<Crc32cWay> ways = Crc32cWays();
  for (const size_t size : {1,    7,    8,    9,    255,  256,  257,  511,  512,  513,
                            1023, 1024, 3071, 3072, 3073, 3080, 6143, 6144, 6145, 9999}) {
    for (size_t begin = 0; begin < 9; ++begin) {
      const uint32_t expected = Slow(data, begin, begin + size);
      ASSERT_EQ(Crc32c(data.data() + begin, size), expected) << size << " bytes from " << begin;
      for (size_t way = 0; way < ways.size(); ++way) {
        ASSERT_EQ(ways[way](data.data() + begin, size, 0), expected)
            << size << " bytes from " << begin << ", way " << way;
      }
    }
  }
}

TEST(Crc32c, PiecesChain) {
  const std::vector<unsigned char> data = Noise(20000);
  const uint32_t whole = Crc32c(data.data(), data.size());
  for (const size_t cut : {0, 1, 100, 3072, 5000, 19999, 20000}) {
    const uint32_t first = Crc32c(data.data(), cut);
    EXPECT_EQ(Crc32c(data.data() + cut, data.size() - cut, first), whole) << cut;
  }
}

TEST(Crc32c, EverySingleBitFlipChangesIt) {
  std::vector<unsigned char> data = Noise(4000);
  const uint32_t whole = Crc32c(data.data(), data.size());
  for (size_t bit = 0; bit < 8 * data.size(); bit += 7) {
    data[bit / 8] = static_cast<unsigned char>(data[bit / 8] ^ 1u << bit % 8);
    ASSERT_NE(Crc32c(data.data(), data.size()), whole) << bit;
    data[bit / 8] = static_cast<unsigned char>(data[bit / 8] ^ 1u << bit % 8);
  }
}

// Not a check: prints the speed in cache, best of 20.
TEST(Crc32c, Speed) {
  const std::vector<unsigned char> data = Noise(1 << 20);
  double best = 0;
  uint32_t crc = 0;
  for (int i = 0; i < 20; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < 16; ++k) crc = Crc32c(data.data(), data.size(), crc);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, 16 * static_cast<double>(data.size()) / took.count());
  }
  std::printf("CRC32C: %.1f GB/s (%08x)\n", best * 1e-9, crc);
}

}  // namespace
}  // namespace krait
