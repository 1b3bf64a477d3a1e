// Every op on the CPU, from one description of its call (tests/support/op_case.h).
#include "kernels/cases/op_cases.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace krait {
namespace {

using testing::OpCase;

class Op : public ::testing::TestWithParam<OpCase> {};

TEST_P(Op, FloatIsWithinRoundingOfDouble) { CheckFloat(GetParam()); }

TEST_P(Op, BFloat16IsTheRoundedFloat) { CheckBFloat16(GetParam()); }

TEST_P(Op, PlanningTakesTheScratchOfTheRun) {
  for (const DType compute : {DType::kF32, DType::kF64, DType::kBF16}) {
    CheckPlanning(GetParam(), compute);
  }
}

INSTANTIATE_TEST_SUITE_P(, Op, ::testing::ValuesIn(testing::OpCases()),
                         [](const auto& c) { return c.param.TestName(); });

}  // namespace
}  // namespace krait
