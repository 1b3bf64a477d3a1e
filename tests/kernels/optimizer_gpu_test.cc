// The CUDA AdamW and its sums against the CPU versions of the same header; tolerances:
// support/on_gpu.h.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/optimizer.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CopyValues;
using testing::ExpectMatches;
using testing::ExpectNear;
using testing::Get;
using testing::kNaN;
using testing::kUlp;
using testing::MaxAbs;
using testing::OnGpu;
using testing::SameBits;
using testing::Set;
using testing::Values;

const AdamWSettings kSettings{.lr = 1e-2, .beta2 = 0.99, .weight_decay = 0.1, .clip = 1};

// The parameter is the dtype of weights.
class OptimizerGpu : public testing::GpuOpTest {};

TEST_P(OptimizerGpu, Sums) {
  if (!f32()) GTEST_SKIP() << "gradients are f32";
  for (const int64_t n : {1, 3, 4, 1000, 4097, 1500007}) {
    for (const int64_t shift : {0, 1}) {
      SCOPED_TRACE(::testing::Message() << "n " << n << " shift " << shift);
      Buf x(DType::kF32, {n}), sum(DType::kF64, {1}), squares(DType::kF64, {1});
      x.FillNormal(1), sum.Fill(3), squares.Fill(5);
      Buf rsum(DType::kF64, {1}), rsquares(DType::kF64, {1});
      rsum.Fill(3), rsquares.Fill(5);
      AddSum(rsum, x, *cpu_), AddSumOfSquares(rsquares, x, *cpu_);
      std::vector<double> bits;
      for (int run = 0; run < 2; ++run) {
        sum.Fill(3), squares.Fill(5);
        OnGpu gx(x, shift), gsum(sum), gsquares(squares);
        AddSum(gsum, gx, *gpu_), AddSumOfSquares(gsquares, gx, *gpu_);
        gsum.Download(), gsquares.Download();
        bits.push_back(Get(sum, 0)), bits.push_back(Get(squares, 0));
      }
      EXPECT_EQ(bits[0], bits[2]);
      EXPECT_EQ(bits[1], bits[3]);
      // Doubles: n roundings of 2^-53 at most, of the sum of magnitudes.
      const double count = static_cast<double>(n);
      EXPECT_NEAR(bits[0], Get(rsum, 0), count * count * 0x1p-52 + 0x1p-50);
      EXPECT_NEAR(bits[1], Get(rsquares, 0), count * 0x1p-52 * Get(rsquares, 0));
    }
  }
  Buf x(DType::kF32, {5000}), sum(DType::kF64, {1});
  x.FillNormal(1);
  for (const double bad : {kNaN, HUGE_VAL}) {
    Set(x, 4321, bad);
    OnGpu gx(x), gsum(sum);
    AddSumOfSquares(gsum, gx, *gpu_);
    gsum.Download();
    EXPECT_FALSE(std::isfinite(Get(sum, 0)));
  }
}

TEST_P(OptimizerGpu, Prepare) {
  if (!f32()) GTEST_SKIP() << "one dtype";
  const auto run = [&](double squares, std::vector<double> losses, const AdamWSettings& settings) {
    SCOPED_TRACE(::testing::Message() << squares << " clip " << settings.clip);
    Buf sum(DType::kF64, {1}), loss(DType::kF64, {static_cast<int64_t>(losses.size())});
    Buf control(DType::kF64, {kAdamWControlSize}), expected(DType::kF64, {kAdamWControlSize});
    sum.Fill(squares), loss.Assign(losses);
    control.Assign({6, 1, 1, 0.5, 0.25, 2}), expected.Assign({6, 1, 1, 0.5, 0.25, 2});
    OnGpu gsum(sum), gloss(loss), gcontrol(control);
    AdamWPrepare(gcontrol, gsum, gloss, settings, *gpu_);
    gcontrol.Download();
    AdamWPrepare(expected, sum, loss, settings, *cpu_);
    for (int64_t i = 0; i < kAdamWControlSize; ++i) {
      const double e = Get(expected, i), a = Get(control, i);
      if (std::isnan(e)) {
        EXPECT_TRUE(std::isnan(a)) << i;
      } else if (std::isinf(e)) {
        EXPECT_EQ(a, e) << i;
      } else {
        EXPECT_NEAR(a, e, 0x1p-48 * std::fabs(e)) << i;  // pow() differs by units in the last place
      }
    }
    return Get(control, kAdamWApplied);
  };
  EXPECT_EQ(run(25, {1, 2}, kSettings), 1);
  EXPECT_EQ(run(0.25, {1}, kSettings), 1);
  AdamWSettings unclipped = kSettings;
  unclipped.clip = 0;
  EXPECT_EQ(run(25, {1}, unclipped), 1);
  EXPECT_EQ(run(kNaN, {1}, kSettings), 0);
  EXPECT_EQ(run(HUGE_VAL, {1}, kSettings), 0);
  EXPECT_EQ(run(25, {1, kNaN, 1}, kSettings), 0);
  AdamWSettings limited = kSettings;
  limited.max_norm = 5, limited.max_loss = 2;
  EXPECT_EQ(run(25, {2, 3}, limited), 1);
  EXPECT_EQ(run(25.01, {2, 3}, limited), 0);
  EXPECT_EQ(run(25, {2.01, 3}, limited), 0);
}

struct Case {
  int64_t n;
  DType moments;
  int64_t shift;
};

TEST_P(OptimizerGpu, AdamW) {
  for (const Case& c :
       {Case{1, DType::kF32, 0}, Case{7, DType::kF32, 0}, Case{4099, DType::kF32, 0},
        Case{100003, DType::kF32, 0}, Case{5003, DType::kF32, 1}, Case{100003, DType::kBF16, 0},
        Case{2050, DType::kBF16, 1}}) {
    SCOPED_TRACE(::testing::Message()
                 << "n " << c.n << " moments " << Name(c.moments) << " shift " << c.shift);
    Buf master(DType::kF32, {c.n}), grad(DType::kF32, {c.n}), weight(dtype(), {c.n});
    Buf m(c.moments, {c.n}), v(c.moments, {c.n}), control(DType::kF64, {kAdamWControlSize});
    master.FillNormal(1), grad.FillNormal(2), m.FillNormal(3, 0.1), weight.Fill(kNaN);
    for (int64_t i = 0; i < c.n; ++i) Set(v, i, 0.01 + 0.1 * std::fabs(Get(master, i)));
    control.Assign({7, 2, 1, 0.5, 2e-2, 3});
    // Ranges within an access, within a block, over several blocks and to the end.
    Buf ranges(DType::kI64, {5, 2});
    const std::vector<double> bounds = {0, 1, 3, 6, 1000, 1001, 2000, 9001, 50000, 100003};
    std::vector<double> cut;
    for (const double b : bounds) cut.push_back(std::min(b, static_cast<double>(c.n)));
    ranges.Assign(cut);

    const DType wide = c.moments == DType::kF32 ? DType::kF64 : DType::kF32;
    const DType moments = c.moments == DType::kF32 ? DType::kF64 : DType::kBF16;
    Buf rmaster(wide, {c.n}), rgrad(wide, {c.n}), rm(moments, {c.n}), rv(moments, {c.n});
    CopyValues(rmaster, master), CopyValues(rgrad, grad), CopyValues(rm, m), CopyValues(rv, v);
    Buf step_ranges(DType::kI64, {3, 2}), scales(DType::kF64, {3});
    cut.clear();
    for (const double b : {2.0, 5.0, 1000.0, 1003.0, 1500.0, 70001.0}) {
      cut.push_back(std::min(b, static_cast<double>(c.n)));
    }
    step_ranges.Assign(cut), scales.Assign({0.25, 3, 0.125});
    krait::AdamW(rmaster, rmaster, rm, rv, rgrad, ranges, {step_ranges, scales}, control, kSettings,
                 *cpu_);

    const bool copies = !f32();
    const std::vector<double> before[] = {Values(master), Values(m), Values(v)};
    OnGpu gmaster(master, c.shift), ggrad(grad, c.shift), gweight(weight, c.shift);
    OnGpu gm(m, c.shift), gv(v, c.shift), granges(ranges), gsteps(step_ranges), gscales(scales);
    const StepScales step_scales{gsteps, gscales};
    Set(control, kAdamWApplied, 0);
    OnGpu skip(control);
    Set(control, kAdamWApplied, 1);
    OnGpu gcontrol(control);
    const Tensor out = copies ? gweight.tensor() : gmaster.tensor();
    const auto download = [&] {
      for (OnGpu* t : {&gmaster, &gm, &gv, &gweight}) t->Download();
    };
    krait::AdamW(out, gmaster, gm, gv, ggrad, granges, step_scales, skip, kSettings, *gpu_);
    download();
    EXPECT_EQ(Values(master), before[0]) << "a skipped step changes nothing";
    EXPECT_EQ(Values(m), before[1]);
    EXPECT_EQ(Values(v), before[2]);
    // Scales of 1 give the bits of none.
    Buf ones(DType::kF64, {3}), w(DType::kF32, {c.n});
    ones.Fill(1);
    const OnGpu gones(ones);
    std::vector<double> unscaled[2];
    for (const int with : {0, 1}) {
      w.Assign(before[0]);
      OnGpu gw(w, c.shift), gmean(m, c.shift), gsquare(v, c.shift);
      krait::AdamW(gw, gw, gmean, gsquare, ggrad, granges,
                   with == 1 ? StepScales{gsteps, gones} : StepScales(), gcontrol, kSettings,
                   *gpu_);
      gw.Download();
      unscaled[with] = Values(w);
    }
    EXPECT_EQ(unscaled[0], unscaled[1]);
    krait::AdamW(out, gmaster, gm, gv, ggrad, granges, step_scales, gcontrol, kSettings, *gpu_);
    download();

    // m and v are sums of two products; the step adds about ten roundings of its own size.
    const double m_error = 8 * kUlp * (MaxAbs(rm) + MaxAbs(rgrad));
    const double v_error = 8 * kUlp * (MaxAbs(rv) + 1);
    ExpectMatches("m", m, rm, m_error, 1e-3);
    ExpectMatches("v", v, rv, v_error, 1e-3);
    const double step = 3 * 2e-2 * (MaxAbs(rm) + m_error) / (3 * std::sqrt(0.009));
    ExpectNear("master", master, rmaster, 4 * kUlp * MaxAbs(rmaster) + 64 * kUlp * step);
    for (int64_t i = 0; copies && i < c.n; ++i) {
      const auto rounded = testing::ToBF16(static_cast<float>(Get(master, i)));
      ASSERT_EQ(Get(weight, i), testing::FromBF16(rounded)) << i;
    }
    // Without ranges nothing decays: a gradient and moments of zero then leave the weights.
    grad.Fill(0), m.Fill(0);
    const std::vector<double> still = Values(master);
    OnGpu zero_grad(grad, c.shift), zero_m(m, c.shift);
    krait::AdamW(out, gmaster, zero_m, gv, zero_grad, Tensor(), gcontrol, kSettings, *gpu_);
    download();
    EXPECT_EQ(Values(master), still);
  }
}

INSTANTIATE_TEST_SUITE_P(, OptimizerGpu, testing::kGpuDTypes, testing::DTypeName);

}  // namespace
}  // namespace krait
