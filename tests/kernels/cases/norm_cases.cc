#include "kernels/activation.h"
#include "kernels/cases/op_cases.h"
#include "kernels/inner_norms.h"
#include "kernels/rms_norm.h"

namespace krait::testing {
namespace {

constexpr OperandType kCompute = OperandType::kCompute, kWide = OperandType::kWide;
constexpr double kEps = 1e-3;

// 1 / sqrt(mean(x^2) + eps) of the rows [M, columns] that `x` fills, from column `begin` on.
std::vector<double> Rstd(const Initial& x, int64_t m, int64_t width, int64_t begin,
                         int64_t columns) {
  Buf values(DType::kF64, {m, width});
  x(&values);
  std::vector<double> rstd;
  for (int64_t i = 0; i < m; ++i) {
    double squares = 0;
    for (int64_t k = begin; k < begin + columns; ++k) {
      squares += Get(values, i * width + k) * Get(values, i * width + k);
    }
    rstd.push_back(1 / std::sqrt(squares / static_cast<double>(columns) + kEps));
  }
  return rstd;
}

struct Shape {
  int64_t m, d, pad = 0;
};
const Shape kShapes[] = {{0, 5}, {1, 2}, {1, 7, 2}, {5, 33, 3}, {3, 64, 8}, {67, 320}, {3, 4097}};

void AddRmsNorm(const Shape& s, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.m, s.d, s.pad});
  const std::vector<int64_t> rows = {s.m, s.d};
  const Initial x = Normal(1, 2), w = Normal(2, 0.1, 1), dy = Normal(3);
  const Initial rstd = List(Rstd(x, s.m, s.d, 0, s.d));
  // The terms of dx and dh cancel: rstd * dy * w, and what was there. Those of dw: dy * xhat.
  const Tolerance dx = Sum(s.d, 8), dw = Sum(s.m, 8 * std::sqrt(s.m));
  cases->push_back(OpCase("RmsNormForward", what)
                       .OwnBf16Loops()
                       .Out("y", kCompute, rows, Sum(s.d))
                       .Pad(s.pad)
                       .Out("rstd", kWide, {s.m}, Sum(s.d))
                       .In("x", kCompute, rows, x)
                       .Pad(2 * s.pad)
                       .In("w", kWide, {s.d}, w)
                       .Call([](const Operands& t, const Context& ctx) {
                         RmsNormForward(t["y"], t["rstd"], t["x"], t["w"], kEps, ctx);
                       }));
  for (const bool accumulate : {false, true}) {
    OpCase backward("RmsNormBackward", what + (accumulate ? " accumulated" : ""));
    if (accumulate) {
      backward.InOut("dx", kCompute, rows, Normal(4), dx);
    } else {
      backward.Out("dx", kCompute, rows, dx);
    }
    backward.Pad(s.pad)
        .InOut("dw", kWide, {s.d}, Normal(5), dw)
        .In("dy", kCompute, rows, dy)
        .Pad(s.pad)
        .In("x", kCompute, rows, x)
        .In("rstd", kWide, {s.m}, rstd)
        .In("w", kWide, {s.d}, w)
        .Call([accumulate](const Operands& t, const Context& ctx) {
          RmsNormBackward(t["dx"], t["dw"], t["dy"], t["x"], t["rstd"], t["w"], accumulate, ctx);
        });
    cases->push_back(backward);
  }

  // h is rounded before its norm is taken.
  const auto with_rounded_h = [](const Operands& t, Tensor h, Tensor residual, const Context& ctx) {
    Copy(h, residual, ctx);
    AddInPlace(h, t["delta"], ctx);
    RoundToBF16(h, ctx);
    ResidualRmsNormForward(h, t["y"], t["rstd"], h, Tensor(), t["w"], kEps, ctx);
  };
  cases->push_back(OpCase("ResidualRmsNormForward", what)
                       .OwnBf16Loops()
                       .Out("h", kCompute, rows, Sum(1))
                       .Pad(s.pad)
                       .Out("y", kCompute, rows, Sum(s.d))
                       .Out("rstd", kWide, {s.m}, Sum(s.d))
                       .In("residual", kCompute, rows, x)
                       .In("delta", kCompute, rows, Normal(6))
                       .Pad(s.pad)
                       .In("w", kWide, {s.d}, w)
                       .Call([](const Operands& t, const Context& ctx) {
                         ResidualRmsNormForward(t["h"], t["y"], t["rstd"], t["residual"],
                                                t["delta"], t["w"], kEps, ctx);
                       })
                       .CallWithRoundings([=](const Operands& t, const Context& ctx) {
                         with_rounded_h(t, t["h"], t["residual"], ctx);
                       }));
  cases->push_back(OpCase("ResidualRmsNormForward", what + " in place")
                       .OwnBf16Loops()
                       .InOut("residual", kCompute, rows, x, Sum(1))
                       .Out("y", kCompute, rows, Sum(s.d))
                       .Out("rstd", kWide, {s.m}, Sum(s.d))
                       .In("delta", kCompute, rows, Normal(6))
                       .In("w", kWide, {s.d}, w)
                       .Call([](const Operands& t, const Context& ctx) {
                         ResidualRmsNormForward(t["residual"], t["y"], t["rstd"], t["residual"],
                                                t["delta"], t["w"], kEps, ctx);
                       })
                       .CallWithRoundings([=](const Operands& t, const Context& ctx) {
                         with_rounded_h(t, t["residual"], t["residual"], ctx);
                       }));
  cases->push_back(OpCase("ResidualRmsNormForward", what + " without delta")
                       .OwnBf16Loops()
                       .In("residual", kCompute, rows, x)
                       .Out("y", kCompute, rows, Sum(s.d))
                       .Out("rstd", kWide, {s.m}, Sum(s.d))
                       .In("w", kWide, {s.d}, w)
                       .Call([](const Operands& t, const Context& ctx) {
                         ResidualRmsNormForward(t["residual"], t["y"], t["rstd"], t["residual"],
                                                Tensor(), t["w"], kEps, ctx);
                       }));
  cases->push_back(OpCase("ResidualRmsNormBackward", what)
                       .Out("dh", kCompute, rows, dx)
                       .Pad(s.pad)
                       .InOut("dw", kWide, {s.d}, Normal(5), dw)
                       .In("dy", kCompute, rows, dy)
                       .In("dh_in", kCompute, rows, Normal(7))
                       .Pad(s.pad)
                       .In("h", kCompute, rows, x)
                       .In("rstd", kWide, {s.m}, rstd)
                       .In("w", kWide, {s.d}, w)
                       .Call([](const Operands& t, const Context& ctx) {
                         ResidualRmsNormBackward(t["dh"], t["dw"], t["dy"], t["dh_in"], t["h"],
                                                 t["rstd"], t["w"], ctx);
                       }));
  cases->push_back(OpCase("ResidualRmsNormBackward", what + " in place")
                       .InOut("dh", kCompute, rows, Normal(7), dx)
                       .InOut("dw", kWide, {s.d}, Normal(5), dw)
                       .In("dy", kCompute, rows, dy)
                       .In("h", kCompute, rows, x)
                       .In("rstd", kWide, {s.m}, rstd)
                       .In("w", kWide, {s.d}, w)
                       .Call([](const Operands& t, const Context& ctx) {
                         ResidualRmsNormBackward(t["dh"], t["dw"], t["dy"], t["dh"], t["h"],
                                                 t["rstd"], t["w"], ctx);
                       }));
}

struct InnerShape {
  int64_t m, r, n, pad = 0;
};

void AddInnerNorms(const InnerShape& s, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.m, s.r, s.n, s.pad});
  const int64_t width = s.r + 2 * s.n;
  const Initial projected = Normal(1, 2);
  std::vector<double> rstd;
  for (const auto& [begin, columns] :
       {std::pair<int64_t, int64_t>{0, s.r}, {s.r, s.n}, {s.r + s.n, s.n}}) {
    const std::vector<double> part = Rstd(projected, s.m, width, begin, columns);
    rstd.insert(rstd.end(), part.begin(), part.end());
  }
  const auto add_weights = [&](OpCase* c) {
    c->In("w_dt", kWide, {s.r}, Normal(2, 0.1, 1))
        .In("w_b", kWide, {s.n}, Normal(3, 0.1, 1))
        .In("w_c", kWide, {s.n}, Normal(4, 0.1, 1));
  };
  OpCase forward("InnerNormsForward", what);
  forward.Out("normed", kCompute, {s.m, width}, Sum(s.r + s.n))
      .Pad(s.pad)
      .Out("rstd", kWide, {3, s.m}, Sum(s.r + s.n))
      .In("projected", kWide, {s.m, width}, projected)
      .Pad(2 * s.pad);
  add_weights(&forward);
  forward.Call([](const Operands& t, const Context& ctx) {
    InnerNormsForward(t["normed"], t["rstd"], t["projected"], {t["w_dt"], t["w_b"], t["w_c"]}, kEps,
                      ctx);
  });
  cases->push_back(forward);
  const Tolerance dw = Sum(s.m, 8 * std::sqrt(s.m));
  OpCase backward("InnerNormsBackward", what);
  backward.Out("d_projected", kCompute, {s.m, width}, Sum(s.r + s.n, 16))
      .Pad(s.pad)
      .InOut("dw_dt", kWide, {s.r}, Normal(5), dw)
      .InOut("dw_b", kWide, {s.n}, Normal(6), dw)
      .InOut("dw_c", kWide, {s.n}, Normal(7), dw)
      .In("d_normed", kWide, {s.m, width}, Normal(8))
      .Pad(s.pad)
      .In("projected", kWide, {s.m, width}, projected)
      .In("rstd", kWide, {3, s.m}, List(rstd));
  add_weights(&backward);
  backward.Call([](const Operands& t, const Context& ctx) {
    InnerNormsBackward(t["d_projected"], {t["dw_dt"], t["dw_b"], t["dw_c"]}, t["d_normed"],
                       t["projected"], t["rstd"], {t["w_dt"], t["w_b"], t["w_c"]}, ctx);
  });
  cases->push_back(backward);
  cases->push_back(OpCase("InnerNormsForward", what + " without weights")
                       .Out("normed", kCompute, {s.m, width}, Exact())
                       .In("projected", kWide, {s.m, width}, projected)
                       .Pad(s.pad)
                       .Call([](const Operands& t, const Context& ctx) {
                         InnerNormsForward(t["normed"], Tensor(), t["projected"], {}, kEps, ctx);
                       }));
  cases->push_back(OpCase("InnerNormsBackward", what + " without weights")
                       .Out("d_projected", kCompute, {s.m, width}, Exact())
                       .Pad(s.pad)
                       .In("d_normed", kWide, {s.m, width}, Normal(8))
                       .In("projected", kWide, {s.m, width}, projected)
                       .Call([](const Operands& t, const Context& ctx) {
                         InnerNormsBackward(t["d_projected"], {}, t["d_normed"], t["projected"],
                                            Tensor(), {}, ctx);
                       }));
}

}  // namespace

void AddNormCases(std::vector<OpCase>* cases) {
  for (const Shape& s : kShapes) AddRmsNorm(s, cases);
  for (const InnerShape& s : {InnerShape{1, 3, 2}, InnerShape{5, 20, 16, 3}, InnerShape{67, 7, 5},
                              InnerShape{9, 256, 16}, InnerShape{3, 160, 64, 8}}) {
    AddInnerNorms(s, cases);
  }
}

}  // namespace krait::testing
