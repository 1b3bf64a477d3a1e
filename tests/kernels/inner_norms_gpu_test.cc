// The CUDA inner norms against the CPU version of the same header; tolerances: support/on_gpu.h.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/inner_norms.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CopyValues;
using testing::ExpectMatches;
using testing::ExpectNear;
using testing::kNaN;
using testing::MaxAbs;
using testing::OnGpu;
using testing::SameBits;

constexpr double kEps = 1e-6;

struct Shape {
  int64_t rows, r, n, pad = 0;
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "M " << s.rows << " R " << s.r << " N " << s.n << " pad " << s.pad;
}

class InnerNormsGpu : public testing::GpuOpTest {};

TEST_P(InnerNormsGpu, ForwardAndBackward) {
  for (const Shape& s : {Shape{1, 4, 3}, Shape{5, 8, 16, 8}, Shape{33, 100, 16, 3},
                         Shape{2500, 256, 16}, Shape{7, 512, 16}, Shape{3, 1024, 64, 1}}) {
    SCOPED_TRACE(::testing::Message() << s);
    const int64_t columns = s.r + 2 * s.n;
    Buf projected(DType::kF32, {s.rows, columns}, s.pad), normed(dtype(), {s.rows, columns}, s.pad);
    Buf d_normed(DType::kF32, {s.rows, columns}, s.pad), rstd(DType::kF32, {3, s.rows});
    Buf d_projected(dtype(), {s.rows, columns}, s.pad);
    Buf w_dt(DType::kF32, {s.r}), w_b(DType::kF32, {s.n}), w_c(DType::kF32, {s.n});
    Buf dw_dt(DType::kF32, {s.r}), dw_b(DType::kF32, {s.n}), dw_c(DType::kF32, {s.n});
    projected.FillNormal(1, 2.0), d_normed.FillNormal(2);
    w_dt.FillNormal(3, 0.1, 1), w_b.FillNormal(4, 0.1, 1), w_c.FillNormal(5, 0.1, 1);
    dw_dt.FillNormal(6), dw_b.FillNormal(7), dw_c.FillNormal(8);
    normed.Fill(kNaN), rstd.Fill(kNaN), d_projected.Fill(kNaN);

    const DType wide = ref_wide();
    Buf rp(wide, {s.rows, columns}), rn(ref(), {s.rows, columns}), rd(wide, {s.rows, columns});
    Buf rrstd(wide, {3, s.rows}), rdp(ref(), {s.rows, columns});
    Buf rw_dt(wide, {s.r}), rw_b(wide, {s.n}), rw_c(wide, {s.n});
    Buf rdw_dt(wide, {s.r}), rdw_b(wide, {s.n}), rdw_c(wide, {s.n});
    CopyValues(rp, projected), CopyValues(rd, d_normed);
    CopyValues(rw_dt, w_dt), CopyValues(rw_b, w_b), CopyValues(rw_c, w_c);
    CopyValues(rdw_dt, dw_dt), CopyValues(rdw_b, dw_b), CopyValues(rdw_c, dw_c);
    InnerNormsForward(rn, rrstd, rp, {rw_dt, rw_b, rw_c}, kEps, *cpu_);
    InnerNormsBackward(rdp, {rdw_dt, rdw_b, rdw_c}, rd, rp, rrstd, {rw_dt, rw_b, rw_c}, *cpu_);

    std::vector<Buf> bits;
    for (int run = 0; run < 2; ++run) {
      OnGpu gp(projected), gn(normed), grstd(rstd), gd(d_normed), gdp(d_projected);
      OnGpu gw_dt(w_dt), gw_b(w_b), gw_c(w_c), gdw_dt(dw_dt), gdw_b(dw_b), gdw_c(dw_c);
      InnerNormsForward(gn, grstd, gp, {gw_dt, gw_b, gw_c}, kEps, *gpu_);
      InnerNormsBackward(gdp, {gdw_dt, gdw_b, gdw_c}, gd, gp, grstd, {gw_dt, gw_b, gw_c}, *gpu_);
      if (run == 0) {  // the second run's results are compared below, the first's are kept here
        for (const Buf* b : {&dw_dt, &dw_b, &dw_c}) {
          bits.emplace_back(DType::kF32, std::initializer_list<int64_t>{b->tensor().numel()});
        }
        cuda::CopyToHost(bits[0].tensor().raw(), gdw_dt.tensor().raw(), s.r * 4);
        cuda::CopyToHost(bits[1].tensor().raw(), gdw_b.tensor().raw(), s.n * 4);
        cuda::CopyToHost(bits[2].tensor().raw(), gdw_c.tensor().raw(), s.n * 4);
        continue;
      }
      for (OnGpu* t : {&gn, &grstd, &gdp, &gdw_dt, &gdw_b, &gdw_c}) t->Download();
    }
    EXPECT_TRUE(SameBits(dw_dt, bits[0]) && SameBits(dw_b, bits[1]) && SameBits(dw_c, bits[2]));
    EXPECT_TRUE(normed.PaddingIntact() && d_projected.PaddingIntact());
    ExpectNear("rstd", rstd, rrstd, Bound(s.r) * MaxAbs(rrstd));
    ExpectMatches("normed", normed, rn, f32() ? Bound(s.r) * MaxAbs(rn) : 0, Share(s.r));
    const double term = MaxAbs(rrstd) * MaxAbs(rd) * MaxAbs(rw_dt) * 2;
    ExpectMatches("d_projected", d_projected, rdp, Bound(s.r) * term, Share(s.r));
    const double dw_term = std::sqrt(static_cast<double>(s.rows)) * MaxAbs(rd) * 5 + 4;
    ExpectNear("dw_dt", dw_dt, rdw_dt, Bound(s.rows) * dw_term);
    ExpectNear("dw_b", dw_b, rdw_b, Bound(s.rows) * dw_term);
    ExpectNear("dw_c", dw_c, rdw_c, Bound(s.rows) * dw_term);
  }
}

// Of one part of one row.
TEST_P(InnerNormsGpu, SquaresThatOverflowAreSeen) {
  Buf projected(DType::kF32, {3, 36}), normed(dtype(), {3, 36}), rstd(DType::kF32, {3, 3});
  Buf w_dt(DType::kF32, {4}), w_n(DType::kF32, {16});
  projected.FillNormal(1), w_dt.Fill(1), w_n.Fill(1);
  Set(projected, 36 + 5, 1e30);
  OnGpu gp(projected), gn(normed), grstd(rstd), gdt(w_dt), gw(w_n);
  InnerNormsForward(gn, grstd, gp, {gdt, gw, gw}, kEps, *gpu_);
  gn.Download();
  for (int64_t i = 0; i < 3 * 36; ++i) {
    EXPECT_EQ(std::isnan(Get(normed, i)), i >= 36 + 4 && i < 36 + 20) << i;
  }
}

TEST_P(InnerNormsGpu, WithoutWeightsValuesAreRounded) {
  Buf projected(DType::kF32, {5, 40}, 8), normed(dtype(), {5, 40}), expected(dtype(), {5, 40});
  projected.FillNormal(1), normed.Fill(kNaN);
  OnGpu gp(projected), gn(normed);
  InnerNormsForward(gn, Tensor(), gp, {}, kEps, *gpu_);
  gn.Download();
  InnerNormsForward(expected, Tensor(), projected, {}, kEps, *cpu_);
  EXPECT_TRUE(SameBits(normed, expected));
}

INSTANTIATE_TEST_SUITE_P(, InnerNormsGpu, testing::kGpuDTypes, testing::DTypeName);

}  // namespace
}  // namespace krait
