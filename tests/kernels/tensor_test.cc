#include "kernels/tensor.h"

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CheckGradients;
using testing::RelativeError;
using testing::Values;

TEST(Tensor, ContiguousStridesAndViews) {
  std::vector<float> data(24);
  const Tensor t(data.data(), DType::kF32, Device::kCpu, {2, 3, 4});
  EXPECT_EQ(t.rank(), 3);
  EXPECT_EQ(t.numel(), 24);
  EXPECT_EQ(t.bytes(), 96);
  EXPECT_EQ(t.stride(0), 12);
  EXPECT_EQ(t.stride(1), 4);
  EXPECT_EQ(t.stride(-1), 1);
  EXPECT_EQ(t.rows(), 6);
  EXPECT_EQ(t.row_stride(), 4);
  EXPECT_TRUE(t.contiguous());
  const Tensor flat = t.View({6, 4});
  EXPECT_EQ(flat.raw(), t.raw());
  EXPECT_EQ(flat.dim(0), 6);
}

TEST(Tensor, SlicesKeepStridesAndMoveTheStart) {
  std::vector<float> data(24);
  const Tensor t(data.data(), DType::kF32, Device::kCpu, {2, 3, 4});
  const Tensor columns = t.Slice(-1, 1, 2);
  EXPECT_EQ(columns.data<float>(), data.data() + 1);
  EXPECT_EQ(columns.dim(2), 2);
  EXPECT_EQ(columns.row_stride(), 4);
  EXPECT_FALSE(columns.contiguous());
  const Tensor row = t.Slice(0, 1, 1);
  EXPECT_EQ(row.data<float>(), data.data() + 12);
  EXPECT_TRUE(row.contiguous());
  EXPECT_EQ(t.Slice(1, 3, 0).numel(), 0);
  EXPECT_FALSE(Tensor().defined());
}

TEST(TensorDeathTest, BrokenInvariantsAreFatal) {
  std::vector<float> data(6);
  const Tensor t(data.data(), DType::kF32, Device::kCpu, {2, 3});
  EXPECT_DEATH(t.data<double>(), "check failed");
  EXPECT_DEATH(t.Slice(1, 2, 2), "check failed");
  EXPECT_DEATH(t.Slice(1, 0, 2).View({4}), "check failed");
  EXPECT_DEATH(t.View({5}), "check failed");
}

TEST(TensorDeathTest, DeviceMemoryIsNotReadOnTheHost) {
  float value = 1;
  const Tensor host(&value, DType::kF32, Device::kCpu, {1});
  const Tensor device(&value, DType::kF32, Device::kCuda, {1});
  EXPECT_EQ(*host.data<float>(), 1);
  EXPECT_EQ(device.device_data<float>(), &value);
  EXPECT_DEATH(device.data<float>(), "check failed");
  EXPECT_DEATH(device.Slice(0, 0, 1).data<float>(), "check failed");
  EXPECT_DEATH(host.device_data<float>(), "check failed");
}

TEST(TestSupport, RelativeErrorTreatsNanAndInfinityAsFailure) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(RelativeError({1, 2}, {1, 2}), 0);
  EXPECT_NEAR(RelativeError({3, 4 + 0.05}, {3, 4}), 0.01, 1e-15);
  EXPECT_EQ(RelativeError({0, 0}, {0, 0}), 0);
  EXPECT_EQ(RelativeError({1, 0}, {0, 0}), kInfinity);
  EXPECT_EQ(RelativeError({kNan, 2}, {1, 2}), kInfinity);
  EXPECT_EQ(RelativeError({1, 2}, {1, kNan}), kInfinity);
  EXPECT_EQ(RelativeError({kInfinity}, {kInfinity}), kInfinity);
  EXPECT_EQ(RelativeError({1}, {1, 2}), kInfinity);
}

TEST(TestSupport, BuffersArePaddedWithNan) {
  Buf a(DType::kF32, {3, 5}, 3);
  a.FillNormal(7);
  EXPECT_EQ(a.tensor().row_stride(), 8);
  EXPECT_TRUE(a.PaddingIntact());
  EXPECT_TRUE(std::isnan(a.tensor().data<float>()[5]));
  Buf b(DType::kF32, {3, 5});
  b.FillNormal(7);
  EXPECT_EQ(Values(a), Values(b));
  a.tensor().data<float>()[5] = 0;
  EXPECT_FALSE(a.PaddingIntact());
}

TEST(TestSupport, BFloat16RoundsToNearestEven) {
  using testing::FromBF16;
  using testing::ToBF16;
  EXPECT_EQ(FromBF16(ToBF16(1.0f + 0x1p-8f)), 1.0f);                       // tie, even below
  EXPECT_EQ(FromBF16(ToBF16(1.0f + 3 * 0x1p-8f)), 1.0f + 0x1p-6f);         // tie, even above
  EXPECT_EQ(FromBF16(ToBF16(1.0f + 0x1p-8f + 0x1p-20f)), 1.0f + 0x1p-7f);  // above the tie
  EXPECT_TRUE(std::isnan(FromBF16(ToBF16(std::numeric_limits<float>::quiet_NaN()))));
}

// f = sum_i c_i exp(x_i) w_i: the check accepts the right gradients and names a wrong one.
TEST(TestSupport, GradientCheckAcceptsRightAndRejectsWrongGradients) {
  static Buf x(DType::kF64, {3, 4}, 1), w(DType::kF64, {3, 4}), dx(DType::kF64, {3, 4}),
      dw(DType::kF64, {3, 4});
  x.FillNormal(1);
  w.FillNormal(2);
  const auto loss = [] {
    double sum = 0;
    for (int64_t i = 0; i < 12; ++i) {
      sum += static_cast<double>(i + 1) * std::exp(testing::Get(x, i)) * testing::Get(w, i);
    }
    return sum;
  };
  for (int64_t i = 0; i < 12; ++i) {
    const double e = static_cast<double>(i + 1) * std::exp(testing::Get(x, i));
    testing::Set(dx, i, e * testing::Get(w, i));
    testing::Set(dw, i, e);
  }
  // The error of the numeric gradient itself is far below the bound.
  CheckGradients(loss, {{"x", x, dx}, {"w", w, dw}}, {.bound = 1e-10});
  CheckGradients(loss, {{"x", x, dx}}, {.bound = 1e-10, .max_elements = 5});

  static decltype(loss)* shared_loss = nullptr;
  shared_loss = &loss;
  testing::Set(dx, 3, testing::Get(dx, 3) * (1 + 1e-4));
  EXPECT_NONFATAL_FAILURE(CheckGradients(*shared_loss, {{"x", x, dx}}), "gradient of x");
  testing::Set(dx, 3, std::numeric_limits<double>::quiet_NaN());
  EXPECT_NONFATAL_FAILURE(CheckGradients(*shared_loss, {{"x", x, dx}}), "gradient of x");
}

}  // namespace
}  // namespace krait
