#include "kernels/base/random.h"

#include <cmath>
#include <numbers>

namespace krait {
namespace {

// Round constants of Philox4x32 (Salmon et al. 2011, section 4.3).
constexpr uint32_t kMultiplier0 = 0xD2511F53;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9;
constexpr uint32_t kWeyl1 = 0xBB67AE85;

double ToUniform(uint32_t high, uint32_t low) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 32 | low) >> 11;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

}  // namespace

std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  std::array<uint32_t, 4> c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c[0];
    const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return c;
}

RandomStream::RandomStream(uint64_t seed, RandomPurpose purpose, uint64_t step) {
  // The stream's key and counter half are a Philox image of (seed, purpose, step), so that two
  // different triples share neither.
  const std::array<uint32_t, 4> mixed =
      Philox4x32({static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                  static_cast<uint32_t>(purpose), 0x6B726169},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  key_ = {mixed[0], mixed[1]};
  high_ = {mixed[2], mixed[3]};
}

std::array<uint32_t, 4> RandomStream::Bits(uint64_t index) const {
  return Philox4x32(
      {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), high_[0], high_[1]}, key_);
}

double RandomStream::Uniform(uint64_t index) const {
  const auto bits = Bits(index);
  return ToUniform(bits[0], bits[1]);
}

double RandomStream::Normal(uint64_t index) const {
  const auto bits = Bits(index);
  const double radius = std::sqrt(-2.0 * std::log(ToUniform(bits[0], bits[1])));
  return radius * std::cos(2.0 * std::numbers::pi * ToUniform(bits[2], bits[3]));
}

uint64_t HashName(std::string_view name) {
  uint64_t hash = 0xCBF29CE484222325;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  return hash;
}

KeyedPermutation::KeyedPermutation(uint64_t n, uint64_t seed, RandomPurpose purpose, uint64_t step)
    : n_(n), half_bits_(1), stream_(seed, purpose, step) {
  while (half_bits_ < 32 && (uint64_t{1} << (2 * half_bits_)) < n) ++half_bits_;
}

uint64_t KeyedPermutation::operator()(uint64_t i) const {
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  // Cycle walking: the network permutes [0, 4^half_bits), at most 4 n values, so a few rounds do.
  do {
    uint64_t left = i >> half_bits_;
    uint64_t right = i & mask;
    for (uint64_t round = 0; round < 6; ++round) {
      const uint64_t next = left ^ (stream_.Bits(round << 32 | right)[0] & mask);
      left = right;
      right = next;
    }
    i = left << half_bits_ | right;
  } while (i >= n_);
  return i;
}

}  // namespace krait
