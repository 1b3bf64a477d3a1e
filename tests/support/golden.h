// Tensors of safetensors files as doubles, for testing::RelativeError.
#ifndef KRAIT_TESTS_SUPPORT_GOLDEN_H_
#define KRAIT_TESTS_SUPPORT_GOLDEN_H_

#include <string>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/safetensors.h"

namespace krait::testing {

inline std::vector<double> ReadTensor(const SafetensorsReader& reader, const std::string& name) {
  const auto entry = reader.entries().find(name);
  if (entry == reader.entries().end()) KRAIT_FATAL(reader.path() + " lacks " + name);
  int64_t n = 1;
  for (int64_t extent : entry->second.shape) n *= extent;
  std::vector<float> values(static_cast<size_t>(n));
  KRAIT_CHECK(reader.ReadF32(name, 0, n, values.data()).ok());
  return {values.begin(), values.end()};
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_GOLDEN_H_
