// Every op on the CPU, from one description of its calls (tests/support/op_case.h), and the checks
// themselves on ops that are wrong.
#include "kernels/cases/op_cases.h"

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/activation.h"

namespace krait {
namespace {

using testing::CasesOf;
using testing::Exact;
using testing::Get;
using testing::Normal;
using testing::OpCase;
using testing::Operands;
using testing::OperandType;
using testing::Set;

// The parameter is the name of an op.
class Op : public ::testing::TestWithParam<std::string> {};

TEST_P(Op, FloatIsWithinRoundingOfDouble) {
  for (const OpCase* c : CasesOf(GetParam())) {
    SCOPED_TRACE(c->what());
    CheckFloat(*c);
  }
}

TEST_P(Op, BFloat16IsTheRoundedFloat) {
  for (const OpCase* c : CasesOf(GetParam())) {
    SCOPED_TRACE(c->what());
    CheckBFloat16(*c);
  }
}

TEST_P(Op, PlanningTakesTheScratchOfTheRun) {
  for (const OpCase* c : CasesOf(GetParam())) {
    SCOPED_TRACE(c->what());
    for (const DType compute : {DType::kF32, DType::kF64, DType::kBF16}) {
      CheckPlanning(*c, compute);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, Op, ::testing::ValuesIn(testing::OpNames()),
                         [](const auto& op) { return op.param; });

// y [3,5] = x, by a function that may do it wrong.
OpCase CopyCase(OpCase::Function call) {
  OpCase c("Copy", "of the test");
  c.Out("y", OperandType::kCompute, {3, 5}, testing::Sum(1))
      .Pad(2)
      .In("x", OperandType::kCompute, {3, 5}, Normal(1))
      .Pad(1)
      .Call(std::move(call));
  return c;
}

void CopyRight(const Operands& t, const Context& ctx) { Copy(t["y"], t["x"], ctx); }

TEST(OpCase, AcceptsARightOp) {
  const OpCase c = CopyCase(CopyRight);
  CheckFloat(c);
  CheckBFloat16(c);
  CheckPlanning(c, DType::kF32);
}

TEST(OpCase, RejectsWrongResults) {
  // One element that is off by 2^-16 of the largest, or not written.
  static const OpCase off = CopyCase([](const Operands& t, const Context& ctx) {
    CopyRight(t, ctx);
    if (t["y"].dtype() != DType::kF64) Set(t["y"], 7, Get(t["y"], 7) + 0x1p-14);
  });
  EXPECT_NONFATAL_FAILURE(CheckFloat(off), "1 of 15 elements, element 7");
  static const OpCase unwritten = CopyCase([](const Operands& t, const Context& ctx) {
    Copy(t["y"].Slice(0, 0, 2), t["x"].Slice(0, 0, 2), ctx);
    if (t["y"].dtype() == DType::kF64) CopyRight(t, ctx);
  });
  EXPECT_NONFATAL_FAILURE(CheckFloat(unwritten), "5 of 15 elements, element 10 is nan");
  // Not written in either dtype.
  static const OpCase never = CopyCase([](const Operands& t, const Context& ctx) {
    Copy(t["y"].Slice(0, 0, 2), t["x"].Slice(0, 0, 2), ctx);
  });
  EXPECT_NONFATAL_FAILURE(CheckFloat(never), "5 of 15 elements, element 10 is nan");
  EXPECT_NONFATAL_FAILURE(CheckBFloat16(never), "5 of 15 elements, element 10 is nan");
  // bf16 that is not the rounded f32, by the least there is.
  static const OpCase neighbour = CopyCase([](const Operands& t, const Context& ctx) {
    CopyRight(t, ctx);
    if (t["y"].dtype() == DType::kBF16) Set(t["y"], 7, Get(t["y"], 7) * (1 + 0x1p-7));
  });
  EXPECT_NONFATAL_FAILURE(CheckBFloat16(neighbour), "y rounded: 1 of 15 elements, element 7");
}

TEST(OpCase, RejectsWritesToOthers) {
  static const OpCase input = CopyCase([](const Operands& t, const Context& ctx) {
    CopyRight(t, ctx);
    Set(t["x"], 3, 0);
  });
  EXPECT_NONFATAL_FAILURE(CheckFloat(input), "x: an input was written");
  EXPECT_NONFATAL_FAILURE(CheckBFloat16(input), "x: an input was written");
  static const OpCase padding = CopyCase([](const Operands& t, const Context& ctx) {
    CopyRight(t, ctx);
    const Tensor y = t["y"];
    if (y.dtype() == DType::kF32) y.data<float>()[5] = 0;
  });
  EXPECT_NONFATAL_FAILURE(CheckFloat(padding), "y: padding was written");
}

TEST(OpCase, RejectsScratchThatWasNotPlanned) {
  static const OpCase more = CopyCase([](const Operands& t, const Context& ctx) {
    const ArenaScope scope(ctx.scratch);
    ctx.scratch->Alloc(DType::kF32, {ctx.planning ? 1000 : 10});
    CopyRight(t, ctx);
  });
  EXPECT_NONFATAL_FAILURE(CheckPlanning(more, DType::kF32), "planned");
}

}  // namespace
}  // namespace krait
