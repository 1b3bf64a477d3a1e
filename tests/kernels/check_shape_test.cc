#include "kernels/check_shape.h"

#include <gtest/gtest.h>

#include <vector>

namespace krait {
namespace {

TEST(CheckShape, NamesOpAndOperandAndBothShapes) {
  std::vector<float> data(24);
  const Tensor x(data.data(), DType::kF32, Device::kCpu, {2, 3, 4});
  CheckShape("Scan", {"x", x}, {2, 3, 4});
  CheckShape("Scan", {"x", x}, {-1, 3, -1});
  CheckDense("Scan", {"x", x}, {2, 3, 4});
  EXPECT_DEATH(CheckShape("Scan", {"x", x}, {2, 3, 5}),
               "Scan: operand x is \\[2, 3, 4\\], needs \\[2, 3, 5\\]");
  EXPECT_DEATH(CheckShape("Scan", {"x", x}, {6, -1}), "needs \\[6, any\\]");
  EXPECT_DEATH(CheckShape("Scan", {"x", Tensor()}, {2}), "operand x is \\[\\], needs \\[2\\]");

  const Tensor columns = x.Slice(2, 1, 2);
  CheckShape("Scan", {"x", columns}, {2, 3, 2});
  EXPECT_DEATH(CheckDense("Scan", {"x", columns}, {2, 3, 2}),
               "x is \\[2, 3, 2\\] with gaps, needs \\[2, 3, 2\\] without gaps");
}

}  // namespace
}  // namespace krait
