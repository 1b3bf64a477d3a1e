// What every op checks before it computes: that its operands are on the device of its context.
#include "kernels/context.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/optimizer.h"
#include "kernels/rms_norm.h"
#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::TestContext;

constexpr DType kF32 = DType::kF32;

// Never read: the checks come first.
Tensor OnCuda(std::initializer_list<int64_t> shape, DType dtype = kF32) {
  static float memory[64];
  return {memory, dtype, Device::kCuda, shape};
}

TEST(ContextDeathTest, AnOperandOnTheOtherDeviceNamesOpAndOperand) {
  const TestContext ctx;
  Buf x(kF32, {2, 4}), w(kF32, {4}), rstd(kF32, {2}), w2(kF32, {3, 4}), y(kF32, {2, 3}),
      heads(kF32, {1, 2, 1, 4}), sum(DType::kF64, {1});
  EXPECT_DEATH(AddInPlace(OnCuda({2, 4}), x, ctx), "AddInPlace on cpu: operand y is on cuda");
  EXPECT_DEATH(Fill(OnCuda({2, 4}), 0, ctx), "Fill on cpu: operand y is on cuda");
  EXPECT_DEATH(LinearForward(y, x, w2, OnCuda({3}), ctx),
               "LinearForward on cpu: operand bias is on cuda");
  EXPECT_DEATH(RmsNormForward(x, rstd, x, OnCuda({4}), 0, ctx),
               "RmsNormForward on cpu: operand w is on cuda");
  EXPECT_DEATH(Rope(heads, {OnCuda({1, 2}, DType::kI32), 0}, 1e4, false, ctx),
               "Rope on cpu: operand doc_start is on cuda");
  EXPECT_DEATH(AddSumOfSquares(OnCuda({1}, DType::kF64), x, ctx),
               "AddSumOfSquares on cpu: operand sum is on cuda");
}

TEST(ContextDeathTest, AHostTensorUnderACudaContext) {
  TestContext ctx;
  ctx.get()->device = Device::kCuda;
  Buf x(kF32, {2, 4}), w(kF32, {4});
  EXPECT_DEATH(AddInPlace(OnCuda({2, 4}), x, ctx), "AddInPlace on cuda: operand x is on cpu");
  EXPECT_DEATH(RmsNormForward(OnCuda({2, 4}), OnCuda({2}), OnCuda({2, 4}), w, 0, ctx),
               "RmsNormForward on cuda: operand w is on cpu");
}

// The same while planning: a CPU-only build plans a CUDA run and finds what is in the wrong place.
TEST(ContextDeathTest, OperandsAreCheckedWhilePlanning) {
  TestContext ctx;
  ctx.get()->planning = true;
  Buf x(kF32, {2, 4});
  EXPECT_DEATH(AddInPlace(OnCuda({2, 4}), x, ctx), "operand y is on cuda");
}

TEST(Context, OptionalOperandsAreOnNoDevice) {
  const TestContext ctx;
  Buf x(kF32, {2, 4}), w(kF32, {3, 4}), y(kF32, {2, 3});
  LinearForward(y, x, w, Tensor(), ctx);
}

TEST(Context, OpsThatCallOthersCountAsOne) {
  TestContext ctx;
  Profile profile;
  ctx.get()->profile = &profile;
  Buf x(kF32, {2, 4});
  AddInPlace(x, x, ctx);
  EXPECT_EQ(profile.Total(OpFamily::kActivation).calls, 1);
  EXPECT_EQ(profile.ops().at("AddInPlace").bytes, 3 * 2 * 4 * 4);
  {
    const OpScope outer(ctx, OpFamily::kMoe, "outer", {});
    AddInPlace(x, x, ctx);
  }
  EXPECT_EQ(profile.Total(OpFamily::kActivation).calls, 1);
  EXPECT_EQ(profile.Total(OpFamily::kMoe).calls, 1);
}

TEST(Context, ProductsCountTheirOperations) {
  TestContext ctx;
  Profile profile;
  ctx.get()->profile = &profile;
  Buf x(kF32, {2, 4}), w(kF32, {3, 4}), y(kF32, {2, 3});
  LinearForward(y, x, w, Tensor(), ctx);
  LinearForward(y, x, w, Tensor(), ctx);
  const Profile::Op& op = profile.ops().at("LinearForward");
  EXPECT_EQ(op.flops, 2 * 2.0 * 2 * 3 * 4);
  EXPECT_EQ(op.bytes, 2 * 4 * (2 * 3 + 2 * 4 + 3 * 4));
  EXPECT_GT(op.seconds, 0);
}

}  // namespace
}  // namespace krait
