// Golden values: tensors of safetensors files, and how far apart two of them are.
#ifndef KRAIT_TESTS_SUPPORT_GOLDEN_H_
#define KRAIT_TESTS_SUPPORT_GOLDEN_H_

#include <cmath>
#include <string>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/safetensors.h"

namespace krait {

inline std::vector<float> ReadTensor(const SafetensorsReader& reader, const std::string& name) {
  const auto entry = reader.entries().find(name);
  if (entry == reader.entries().end()) KRAIT_FATAL(reader.path() + " lacks " + name);
  int64_t n = 1;
  for (int64_t extent : entry->second.shape) n *= extent;
  std::vector<float> values(static_cast<size_t>(n));
  KRAIT_CHECK(reader.ReadF32(name, 0, n, values.data()).ok());
  return values;
}

// Norm of the difference over the norm of `right`; NaN and different sizes give NaN, which no bound
// holds for.
inline double RelativeError(const std::vector<float>& values, const std::vector<float>& right) {
  if (values.size() != right.size()) return std::nan("");
  double difference = 0, norm = 0;
  for (size_t i = 0; i < right.size(); ++i) {
    difference += std::pow(double{values[i]} - double{right[i]}, 2);
    norm += std::pow(double{right[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

}  // namespace krait

#endif  // KRAIT_TESTS_SUPPORT_GOLDEN_H_
