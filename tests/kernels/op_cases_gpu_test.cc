// Every op on CUDA against the CPU, from one description of its call (tests/support/op_case.h).
//
// f32 is compared with the CPU op in f64 on the same values, within the tolerance of each output.
// bf16 is compared with the CPU op in bf16: both sides round the same fp32 value, known up to the
// tolerance, so an output may land on a neighbouring bf16 (at most 2^-7 of it), but only where a
// rounding boundary lies within the tolerance. Boundaries are 2^-8 of a value apart or more, so a
// share of 2^8 times the tolerance does at most; where terms cancel, small values add a logarithm
// of that share, so 8 of it are allowed. An op that rounds values within may hand over neighbours
// there or not round at all: its outputs are within 2^-7 of the size of their terms.
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "kernels/cases/op_cases.h"
#include "kernels/gemm.h"
#include "kernels/moe.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CaseTensors;
using testing::Get;
using testing::GpuContext;
using testing::OnGpu;
using testing::OpCase;
using testing::OpOperand;
using testing::SameBits;

// The ops without a CUDA version: an op whose CPU version comes first is named here until its
// kernel does.
const std::set<std::string>& NotOnCuda() {
  static const std::set<std::string> ops = {};
  return ops;
}

#define KRAIT_NEEDS_CUDA_OP(op)                           \
  do {                                                    \
    if (NotOnCuda().contains(op)) {                       \
      GTEST_SKIP() << (op) << " has no CUDA version yet"; \
    }                                                     \
    KRAIT_NEEDS_GPU();                                    \
  } while (false)

// Runs the case on device copies of `tensors`, allocated exactly, `shift` elements off alignment;
// canaries around them are checked when the copies go. The results replace the CPU's values.
void RunOnGpu(CaseTensors* tensors, int64_t shift, GpuContext* gpu) {
  std::vector<std::unique_ptr<OnGpu>> copies;
  std::vector<Tensor> on_gpu;
  for (size_t i = 0; i < tensors->size(); ++i) {
    copies.push_back(std::make_unique<OnGpu>((*tensors)[i], shift));
    on_gpu.push_back(copies.back()->tensor());
  }
  const OpCase& c = tensors->op_case();
  c.Run({c.operands(), on_gpu}, *gpu);
  for (auto& copy : copies) copy->Download();
}

// A share of elements may be neighbours by rounding.
void ExpectRoundedAlike(const OpCase& c, const OpOperand& operand, Tensor actual, Tensor expected) {
  const double largest = testing::LargestElement(expected);
  const double bound = operand.tolerance.Bound(largest);
  if (c.cuda_rounds_within()) {
    const double size = operand.tolerance.size > 0 ? operand.tolerance.size : largest;
    testing::ExpectNear(operand.name.c_str(), actual, expected, 0x1p-7 * size);
    return;
  }
  const double share = largest > 0 ? 8 * 0x1p8 * bound / largest : 0;
  testing::ExpectSameUpToRounding(operand.name.c_str(), actual, expected, bound, share);
}

void CheckOnGpu(const OpCase& c, DType compute) {
  const DType reference = compute == DType::kF32 ? DType::kF64 : DType::kBF16;
  const CaseTensors before(c, compute);
  CaseTensors expected(c, reference);
  expected.TakeInputs(before);
  c.Run(expected.tensors(), testing::TestContext());
  const int64_t planned = PlannedScratch(before, Device::kCuda);
  for (const int64_t shift : {0, 1}) {
    SCOPED_TRACE("shift " + std::to_string(shift));
    CaseTensors actual(c, compute), again(c, compute);
    for (CaseTensors* run : {&actual, &again}) {
      GpuContext gpu(planned);
      RunOnGpu(run, shift, &gpu);
      EXPECT_EQ(gpu.scratch.high_water(), planned);
      ExpectOthersUntouched(*run, before);
    }
    for (size_t i = 0; i < actual.size(); ++i) {
      const OpOperand& operand = c.operands()[i];
      if (!operand.out) continue;
      EXPECT_TRUE(SameBits(actual[i], again[i])) << operand.name << ": two runs differ";
      const Tensor got = actual[i], want = expected[i];
      if (got.dtype() == DType::kBF16) {
        ExpectRoundedAlike(c, operand, got, want);
      } else if (compute == DType::kBF16 && c.cuda_rounds_within()) {
        ExpectRoundedAlike(c, operand, got, want);
      } else {
        testing::ExpectWithin(operand, got, want);
      }
    }
  }
}

// The parameter is the name of an op.
class OpGpu : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { KRAIT_NEEDS_CUDA_OP(GetParam()); }
  static void Check(DType compute) {
    for (const OpCase* c : testing::CasesOf(GetParam())) {
      SCOPED_TRACE(c->what());
      if (!c->cpu_only().empty()) GTEST_SKIP() << c->cpu_only();
      CheckOnGpu(*c, compute);
    }
  }
};

TEST_P(OpGpu, FloatIsWithinRoundingOfDouble) { Check(DType::kF32); }

TEST_P(OpGpu, BFloat16IsThatOfTheCpu) { Check(DType::kBF16); }

INSTANTIATE_TEST_SUITE_P(, OpGpu, ::testing::ValuesIn(testing::OpNames()),
                         [](const auto& op) { return op.param; });

// A stable sort whose segments begin at multiples of CUDA's alignment.
TEST(MoeSortGpu, SortsIntoAlignedSegments) {
  KRAIT_NEEDS_CUDA_OP("MoeSort");
  const int64_t alignment = ExpertRowAlignment(Device::kCuda);
  for (const auto& [tokens, top_k, experts] :
       {std::array<int64_t, 3>{0, 2, 4}, {1, 1, 1}, {7, 2, 5}, {700, 2, 16}, {999, 1, 3}}) {
    const int64_t n = tokens * top_k, rows = ExpertRows(tokens, top_k, experts, Device::kCuda);
    Buf choice(DType::kI32, {tokens, top_k}), row_of(DType::kI32, {tokens, top_k}),
        source(DType::kI32, {rows}), offsets(DType::kI64, {experts + 1});
    // Expert 1 gets nothing where there are several.
    choice.FillIntegers(1, 0, experts);
    for (int64_t i = 0; i < n && experts > 1; ++i) {
      if (Get(choice, i) == 1) testing::Set(choice, i, 0);
    }
    for (Buf* out : {&row_of, &source, &offsets}) out->Fill(-7);
    GpuContext gpu;
    {
      OnGpu on_choice(choice), on_row(row_of), on_source(source), on_offsets(offsets);
      MoeSort(on_row, on_source, on_offsets, on_choice, gpu);
      on_row.Download(), on_source.Download(), on_offsets.Download();
    }
    std::vector<double> want_source(static_cast<size_t>(rows), -1),
        want_row(static_cast<size_t>(n));
    std::vector<double> want_offsets;
    int64_t row = 0;
    for (int64_t e = 0; e < experts; ++e) {
      want_offsets.push_back(static_cast<double>(row));
      for (int64_t i = 0; i < n; ++i) {
        if (Get(choice, i) != static_cast<double>(e)) continue;
        want_source[static_cast<size_t>(row)] = static_cast<double>(i);
        want_row[static_cast<size_t>(i)] = static_cast<double>(row++);
      }
      row = (row + alignment - 1) / alignment * alignment;
    }
    want_offsets.push_back(static_cast<double>(row));
    EXPECT_EQ(testing::Values(offsets), want_offsets);
    EXPECT_EQ(testing::Values(row_of), want_row);
    EXPECT_EQ(testing::Values(source), want_source);
  }
}

}  // namespace
}  // namespace krait
