// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC'11). A value is a pure function of (seed, purpose, step, index): nothing is stored
// in a checkpoint and nothing depends on the number of ranks or threads. Plain C++.
#ifndef KRAIT_KERNELS_BASE_RANDOM_H_
#define KRAIT_KERNELS_BASE_RANDOM_H_

#include <array>
#include <cstdint>
#include <string_view>

namespace krait {

// What a stream is for: streams of different purposes are independent.
enum class RandomPurpose : uint32_t {
  kInit = 1,  // weights; step = hash of the published name, index = element
  kDataShuffle = 2,
  kDocumentShuffle = 4,
  kSampling = 5,   // generation
  kSynthetic = 6,  // bench and test inputs
};

// The block function: 128 random bits of a counter and a key.
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

class RandomStream {
 public:
  RandomStream(uint64_t seed, RandomPurpose purpose, uint64_t step);

  // 128 random bits for counter `index`.
  std::array<uint32_t, 4> Bits(uint64_t index) const;
  // Uniform in (0, 1), a multiple of 2^-53 shifted by half: never 0 or 1.
  double Uniform(uint64_t index) const;
  // Standard normal (Box-Muller on the two halves of Bits(index)).
  double Normal(uint64_t index) const;

  // The key and the upper half of the counter, for other implementations of the same stream.
  const std::array<uint32_t, 2>& key() const { return key_; }
  const std::array<uint32_t, 2>& high() const { return high_; }

 private:
  std::array<uint32_t, 2> key_;
  std::array<uint32_t, 2> high_;
};

// FNV-1a, 64 bit: turns a published name into a stream key.
uint64_t HashName(std::string_view name);

// A keyed permutation of [0, n) with O(1) state (a Feistel network on the next even power of two,
// walked until it falls inside): position i of an epoch without storing a shuffle.
class KeyedPermutation {
 public:
  KeyedPermutation(uint64_t n, uint64_t seed, RandomPurpose purpose, uint64_t step);
  uint64_t operator()(uint64_t i) const;  // i < n

 private:
  uint64_t n_;
  int half_bits_;
  RandomStream stream_;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_RANDOM_H_
