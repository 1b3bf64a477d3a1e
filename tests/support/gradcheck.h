// Support for tests of ops: buffers with known random content, a comparison that NaN cannot pass,
// and a check of analytic gradients against numeric ones in double precision.
#ifndef KRAIT_TESTS_SUPPORT_GRADCHECK_H_
#define KRAIT_TESTS_SUPPORT_GRADCHECK_H_

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/random.h"
#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::testing {

// The address of element `index` in row-major order of a tensor that may be strided.
inline char* ElementAddress(Tensor t, int64_t index) {
  int64_t offset = 0;
  for (int d = t.rank() - 1; d >= 0; --d) {
    offset += index % t.dim(d) * t.stride(d);
    index /= t.dim(d);
  }
  return static_cast<char*>(t.raw()) + offset * SizeOf(t.dtype());
}

inline float FromBF16(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Round to nearest even; NaN stays NaN.
inline BF16 ToBF16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return BF16{static_cast<uint16_t>(bits >> 16 | 0x40)};
  return BF16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
T Load(const void* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

// Element `index` of a CPU tensor as a double, and its opposite.
inline double Get(Tensor t, int64_t index) {
  const char* address = ElementAddress(t, index);
  switch (t.dtype()) {
    case DType::kF32:
      return Load<float>(address);
    case DType::kF64:
      return Load<double>(address);
    case DType::kBF16:
      return FromBF16(Load<BF16>(address));
    case DType::kI32:
      return Load<int32_t>(address);
    case DType::kI64:
      return static_cast<double>(Load<int64_t>(address));
    default:
      KRAIT_FATAL("no test access to this dtype");
  }
}

inline void Set(Tensor t, int64_t index, double value) {
  char* address = ElementAddress(t, index);
  const auto store = [address](auto x) { std::memcpy(address, &x, sizeof(x)); };
  switch (t.dtype()) {
    case DType::kF32:
      return store(static_cast<float>(value));
    case DType::kF64:
      return store(value);
    case DType::kBF16:
      return store(ToBF16(static_cast<float>(value)));
    case DType::kI32:
      return store(static_cast<int32_t>(value));
    case DType::kI64:
      return store(static_cast<int64_t>(value));
    default:
      KRAIT_FATAL("no test access to this dtype");
  }
}

inline std::vector<double> Values(Tensor t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = Get(t, static_cast<int64_t>(i));
  return values;
}

// An owned CPU tensor. With `pad` > 0 each row is followed by `pad` elements that hold NaN (the
// most negative integer) and belong to no tensor: ops that read them give NaN, and ops that write
// them are found by PaddingIntact().
class Buf {
 public:
  Buf(DType dtype, const std::vector<int64_t>& shape, int64_t pad = 0) : pad_(pad) {
    std::vector<int64_t> full(shape);
    full.back() += pad;
    int64_t n = 1;
    for (int64_t extent : full) n *= extent;
    memory_.assign(static_cast<size_t>(n * SizeOf(dtype)) + 64, 0);
    char* base = memory_.data();
    base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
    switch (full.size()) {
      case 1:
        full_ = Tensor(base, dtype, Device::kCpu, {full[0]});
        break;
      case 2:
        full_ = Tensor(base, dtype, Device::kCpu, {full[0], full[1]});
        break;
      case 3:
        full_ = Tensor(base, dtype, Device::kCpu, {full[0], full[1], full[2]});
        break;
      default:
        full_ = Tensor(base, dtype, Device::kCpu, {full[0], full[1], full[2], full[3]});
    }
    tensor_ = full_.Slice(-1, 0, full_.dim(-1) - pad);
    for (int64_t i = 0; i < full_.numel(); ++i) {
      if (InPadding(i)) Set(full_, i, Sentinel());
    }
  }
  Buf(const Buf&) = delete;
  Buf& operator=(const Buf&) = delete;
  Buf(Buf&& other) = default;  // a moved vector keeps its memory, so the views stay valid

  Tensor tensor() const { return tensor_; }
  operator Tensor() const { return tensor_; }  // NOLINT: buffers are passed where views are taken

  // Standard normal values times `scale` plus `shift`, a function of (seed, element) only: buffers
  // of different dtype or padding get the same values (rounded).
  Buf& FillNormal(uint64_t seed, double scale = 1, double shift = 0) {
    const RandomStream stream(seed, RandomPurpose::kSynthetic, 0);
    for (int64_t i = 0; i < tensor_.numel(); ++i) {
      Set(tensor_, i, stream.Normal(static_cast<uint64_t>(i)) * scale + shift);
    }
    return *this;
  }
  // Uniform integers in [low, high).
  Buf& FillIntegers(uint64_t seed, int64_t low, int64_t high) {
    const RandomStream stream(seed, RandomPurpose::kSynthetic, 0);
    for (int64_t i = 0; i < tensor_.numel(); ++i) {
      const double u = stream.Uniform(static_cast<uint64_t>(i));
      Set(tensor_, i, static_cast<double>(low) + std::floor(u * static_cast<double>(high - low)));
    }
    return *this;
  }
  Buf& Fill(double value) {
    for (int64_t i = 0; i < tensor_.numel(); ++i) Set(tensor_, i, value);
    return *this;
  }
  Buf& Assign(const std::vector<double>& values) {
    KRAIT_CHECK(static_cast<int64_t>(values.size()) == tensor_.numel());
    for (size_t i = 0; i < values.size(); ++i) Set(tensor_, static_cast<int64_t>(i), values[i]);
    return *this;
  }

  bool PaddingIntact() const {
    for (int64_t i = 0; i < full_.numel(); ++i) {
      const double value = Get(full_, i);
      if (InPadding(i) && !std::isnan(value) && value != Sentinel()) return false;
    }
    return true;
  }

 private:
  bool InPadding(int64_t i) const { return i % full_.dim(-1) >= full_.dim(-1) - pad_; }
  double Sentinel() const {
    if (full_.dtype() == DType::kI32) return std::numeric_limits<int32_t>::min();
    if (full_.dtype() == DType::kI64) {
      return static_cast<double>(std::numeric_limits<int64_t>::min());
    }
    return std::numeric_limits<double>::quiet_NaN();
  }

  int64_t pad_;
  std::vector<char> memory_;
  Tensor full_, tensor_;
};

// ||a - b|| / ||b||, 0 when both are zero; infinity when any value of either is not finite or the
// sizes differ, so that a bound on it fails.
inline double RelativeError(const std::vector<double>& a, const std::vector<double>& b) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (a.size() != b.size()) return kInfinity;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  if (!std::isfinite(difference) || !std::isfinite(norm)) return kInfinity;
  if (difference == 0) return 0;
  return norm > 0 ? std::sqrt(difference / norm) : kInfinity;
}
inline double RelativeError(Tensor a, Tensor b) { return RelativeError(Values(a), Values(b)); }

// Whether two tensors of one shape and dtype hold the same bits (strides may differ).
inline bool SameBits(Tensor a, Tensor b) {
  if (a.dtype() != b.dtype() || a.numel() != b.numel()) return false;
  for (int64_t i = 0; i < a.numel(); ++i) {
    if (std::memcmp(ElementAddress(a, i), ElementAddress(b, i),
                    static_cast<size_t>(SizeOf(a.dtype()))) != 0) {
      return false;
    }
  }
  return true;
}

// sum(a * b) in double: the scalar loss of an output under a random cotangent.
inline double Dot(Tensor a, Tensor b) {
  KRAIT_CHECK(a.numel() == b.numel());
  double sum = 0;
  for (int64_t i = 0; i < a.numel(); ++i) sum += Get(a, i) * Get(b, i);
  return sum;
}

// A CPU context with scratch memory, some of which ops take for each thread; checks that an op gave
// back all of it.
class TestContext {
 public:
  explicit TestContext(int64_t scratch_bytes = (int64_t{256} + 8 * omp_get_max_threads()) << 20)
      : scratch_("test scratch", Device::kCpu, scratch_bytes) {
    context_.scratch = &scratch_;
  }
  ~TestContext() { EXPECT_EQ(scratch_.mark(), 0) << "scratch memory was not released"; }
  operator const Context&() const { return context_; }  // NOLINT: passed where a Context is taken
  Context* get() { return &context_; }
  Arena* scratch() { return &scratch_; }

 private:
  Arena scratch_;
  Context context_;
};

// Runs fn with `threads` OpenMP threads and restores the setting.
template <typename Fn>
void WithThreads(int threads, const Fn& fn) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  fn();
  omp_set_num_threads(before);
}

// One input of an op with the analytic gradient of the loss with respect to it; both f64.
struct GradientPair {
  std::string name;
  Tensor value;     // perturbed in place and restored
  Tensor gradient;  // may be undefined only when `value` is empty
};

struct GradientCheckOptions {
  double bound = 1e-7;
  // Error of the fourth-order difference below: h^4 |f'''''| / 30 + 1.5 eps |f| / h. With h = 1e-3
  // and values and derivatives of order one that is 3e-14 + 3e-13.
  double step = 1e-3;
  // Elements checked per tensor, spread over it by a keyed permutation; 0 = all.
  int64_t max_elements = 0;
};

// Compares each analytic gradient with df/dx = (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h:
// ||numeric - analytic|| / ||analytic|| per tensor must stay within the bound. `loss` evaluates the
// op from the tensors of `pairs` and returns its scalar loss (outputs times random cotangents). Run
// the backward before calling this: the gradients are read first. Inputs and outputs are left as an
// unperturbed evaluation leaves them. Runs on one thread: these ops are too small to share.
inline void CheckGradients(const std::function<double()>& loss,
                           const std::vector<GradientPair>& pairs,
                           const GradientCheckOptions& options = {}) {
  std::vector<std::vector<double>> gradients;
  for (const GradientPair& pair : pairs) {
    KRAIT_CHECK(pair.value.dtype() == DType::kF64 && pair.gradient.dtype() == DType::kF64);
    KRAIT_CHECK(pair.value.numel() == pair.gradient.numel());
    gradients.push_back(Values(pair.gradient));
  }
  WithThreads(1, [&] {
    for (size_t p = 0; p < pairs.size(); ++p) {
      const Tensor value = pairs[p].value;
      const int64_t n = value.numel();
      if (n == 0) continue;
      const bool sample = options.max_elements > 0 && options.max_elements < n;
      const KeyedPermutation order(static_cast<uint64_t>(n), 1, RandomPurpose::kSynthetic, p);
      std::vector<double> numeric, analytic;
      for (int64_t k = 0; k < (sample ? options.max_elements : n); ++k) {
        const int64_t i = sample ? static_cast<int64_t>(order(static_cast<uint64_t>(k))) : k;
        const double x = Get(value, i);
        const auto at = [&](double steps) {
          Set(value, i, x + steps * options.step);
          return loss();
        };
        const double inner = at(1) - at(-1);
        const double outer = at(2) - at(-2);
        Set(value, i, x);
        numeric.push_back((8 * inner - outer) / (12 * options.step));
        analytic.push_back(gradients[p][static_cast<size_t>(i)]);
      }
      EXPECT_LE(RelativeError(numeric, analytic), options.bound) << "gradient of " << pairs[p].name;
    }
    loss();
  });
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_GRADCHECK_H_
