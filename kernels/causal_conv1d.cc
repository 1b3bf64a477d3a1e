#include "kernels/causal_conv1d.h"

#include <algorithm>

#include "kernels/base/parallel_for.h"
#include "kernels/check_shape.h"
#include "kernels/cpu/causal_conv1d.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/causal_conv1d.h"

namespace krait {
namespace {

// Tokens of one piece of work of the forward, and of the backward, where the tokens after a piece
// are visited again.
constexpr int64_t kForwardTokens = 16, kBackwardTokens = 128;

struct Sizes {
  int64_t batch, time, channels, taps;
  int64_t padded_taps() const { return cpu::PaddedConvTaps(taps); }
  int64_t pieces() const { return (time + kBackwardTokens - 1) / kBackwardTokens; }  // of a row
};

// [B,T,I], each row without gaps.
void CheckRows(const char* op, const Operand& operand, const Sizes& s) {
  CheckShape(op, operand, {s.batch, s.time, s.channels});
  KRAIT_CHECK(operand.tensor.stride(2) == 1);
}

void CheckState(const char* op, const Operand& operand, const Sizes& s) {
  if (operand.tensor.defined()) CheckDense(op, operand, {s.batch, s.taps - 1, s.channels});
}

Sizes CheckInputs(const char* op, Tensor x, Tensor w, Tensor bias, Tensor initial_state,
                  Tensor doc_start) {
  CheckShape(op, {"x", x}, {-1, -1, -1});
  CheckShape(op, {"w", w}, {-1, -1});
  const Sizes s{x.dim(0), x.dim(1), x.dim(2), w.dim(1)};
  CheckDense(op, {"w", w}, {s.channels, s.taps});
  KRAIT_CHECK(s.taps >= 1 && s.taps <= cpu::kMaxConvTaps);
  if (bias.defined()) CheckDense(op, {"bias", bias}, {s.channels});
  CheckRows(op, {"x", x}, s);
  CheckState(op, {"initial_state", initial_state}, s);
  if (doc_start.defined()) CheckDense(op, {"doc_start", doc_start}, {s.batch, s.time});
  return s;
}

// Positions here count from the first token of the call: those before 0 are in the state.
//
// The row of position `position` in `x` [B,T,I] or, before 0, in `state` [B,K-1,I], as far as a
// token whose document begins at `start` sees it; null where it sees nothing or the tensor is
// undefined.
template <typename T>
T* RowAt(Tensor x, Tensor state, const Sizes& s, int64_t batch, int64_t position, int64_t start) {
  if (position < start) return nullptr;
  if (position >= 0) {
    if (!x.defined()) return nullptr;
    return x.data<T>() + batch * x.stride(0) + position * x.stride(1);
  }
  if (!state.defined()) return nullptr;
  return state.data<T>() + (batch * (s.taps - 1) + position + s.taps - 1) * s.channels;
}

// The first position that token `t` of the row sees; t = T stands for what comes after the row.
int64_t StartOf(const Documents& documents, const Sizes& s, int64_t batch, int64_t t) {
  if (!documents.doc_start.defined() || s.time == 0) return -cpu::kMaxConvTaps;
  return documents.doc_start.data<int32_t>()[batch * s.time + std::min(t, s.time - 1)] -
         documents.first_position;
}

// Weights as [padded K][I], bias (zeros where undefined) and a row of zeros, all of I elements.
template <typename T>
struct Weights {
  T *w, *bias, *zeros;

  static Tensor Alloc(const Sizes& s, const Context& ctx) {
    return ctx.scratch->Alloc(kDTypeOf<T>, {s.padded_taps() + 2, s.channels});
  }
  Weights(Tensor memory, Tensor weight, Tensor bias_tensor, const Sizes& s) {
    w = memory.data<T>();
    bias = w + s.padded_taps() * s.channels;
    zeros = bias + s.channels;
    const int64_t pad = s.padded_taps() - s.taps;
    const T* from = weight.data<T>();
    std::fill_n(w, pad * s.channels, T(0));
    for (int64_t i = 0; i < s.channels; ++i) {
      for (int64_t k = 0; k < s.taps; ++k) w[(pad + k) * s.channels + i] = from[i * s.taps + k];
      bias[i] = bias_tensor.defined() ? bias_tensor.data<T>()[i] : T(0);
      zeros[i] = 0;
    }
  }
};

// Token t of a row.
template <typename T>
cpu::ConvToken<T> TokenOf(Tensor x, Tensor initial_state, const Documents& documents,
                          const Weights<T>& weights, const Sizes& s, int64_t batch, int64_t t) {
  cpu::ConvToken<T> token{s.channels, s.padded_taps(), {}, weights.w, s.channels, weights.bias};
  const int64_t start = StartOf(documents, s, batch, t);
  for (int64_t k = 0; k < token.taps; ++k) {
    const int64_t position = t - token.taps + 1 + k;
    const T* row =
        position > t - s.taps ? RowAt<T>(x, initial_state, s, batch, position, start) : nullptr;
    token.rows[k] = row != nullptr ? row : weights.zeros;
  }
  return token;
}

template <typename T>
void ForwardCpu(Tensor y, Tensor final_state, Tensor x, Tensor w, Tensor bias, Tensor initial_state,
                const Documents& documents, const Sizes& s, const OpScope& op, const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  const Tensor memory = Weights<T>::Alloc(s, ctx);
  if (op.planning()) return;
  const Weights<T> weights(memory, w, bias, s);
  ParallelFor(s.batch * s.time, kForwardTokens, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t batch = m / s.time, t = m % s.time;
      cpu::ConvSilu(TokenOf<T>(x, initial_state, documents, weights, s, batch, t),
                    y.data<T>() + batch * y.stride(0) + t * y.stride(1));
    }
  });
  if (!final_state.defined()) return;
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    const int64_t start = StartOf(documents, s, batch, s.time);
    for (int64_t j = 0; j < s.taps - 1; ++j) {
      const T* row = RowAt<T>(x, initial_state, s, batch, s.time - s.taps + 1 + j, start);
      std::copy_n(row != nullptr ? row : weights.zeros, s.channels,
                  final_state.data<T>() + (batch * (s.taps - 1) + j) * s.channels);
    }
  }
}

struct Operands {
  Tensor dx, d_initial_state, dy, d_final_state;
  Tensor x, w, bias, initial_state;
  Documents documents;
};

// Tokens [begin, end) of a row. The piece owns the gradients of these positions (the first piece
// also those before 0), to which the K-1 tokens after it contribute as well; it visits them for
// that alone. sums [padded K + 1][I], of dw and dbias over its own tokens, are overwritten;
// discard, as large, takes what is not wanted.
template <typename T>
void BackwardPiece(const Operands& in, const Weights<T>& weights, const Sizes& s, int64_t batch,
                   int64_t begin, int64_t end, T* sums, T* discard) {
  const int64_t taps = s.padded_taps();
  std::fill_n(sums, (taps + 1) * s.channels, T(0));
  const int64_t reach = std::min(s.time, end + s.taps - 1);
  for (int64_t t = begin; t < reach; ++t) {
    const int64_t start = StartOf(in.documents, s, batch, t);
    T* d_rows[cpu::kMaxConvTaps];
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t position = t - taps + 1 + k;
      const bool owned =
          position > t - s.taps && position < end && (position >= begin || begin == 0);
      T* row = owned ? RowAt<T>(in.dx, in.d_initial_state, s, batch, position, start) : nullptr;
      d_rows[k] = row != nullptr ? row : discard;
    }
    T* const token_sums = t < end ? sums : discard;
    cpu::ConvSiluGradient(TokenOf<T>(in.x, in.initial_state, in.documents, weights, s, batch, t),
                          in.dy.data<T>() + batch * in.dy.stride(0) + t * in.dy.stride(1), d_rows,
                          token_sums, token_sums + taps * s.channels);
  }
}

// Adds the gradient that arrives through final_state.
template <typename T>
void AddFinalStateGradient(const Operands& in, const Sizes& s) {
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    const int64_t start = StartOf(in.documents, s, batch, s.time);
    for (int64_t j = 0; j < s.taps - 1; ++j) {
      T* row = RowAt<T>(in.dx, in.d_initial_state, s, batch, s.time - s.taps + 1 + j, start);
      if (row == nullptr) continue;
      const T* from = in.d_final_state.data<T>() + (batch * (s.taps - 1) + j) * s.channels;
      for (int64_t i = 0; i < s.channels; ++i) row[i] += from[i];
    }
  }
}

template <typename T>
void BackwardCpu(const Operands& in, Tensor dw, Tensor dbias, const Sizes& s, const OpScope& op,
                 const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  const int64_t taps = s.padded_taps(), sum_size = (taps + 1) * s.channels;
  const Tensor memory = Weights<T>::Alloc(s, ctx);
  const Tensor partial = ctx.scratch->Alloc(kDTypeOf<T>, {s.batch * s.pieces(), sum_size});
  const Tensor discarded = ctx.scratch->Alloc(kDTypeOf<T>, {MaxThreads(), sum_size});
  if (op.planning()) return;
  const Weights<T> weights(memory, in.w, in.bias, s);
  T* const sums = partial.data<T>();
  std::fill_n(discarded.data<T>(), discarded.numel(), T(0));
  if (in.d_initial_state.defined()) {
    std::fill_n(in.d_initial_state.data<T>(), in.d_initial_state.numel(), T(0));
  }
  ParallelFor(s.batch * s.pieces(), 1, [&](int64_t item, int64_t) {
    const int64_t batch = item / s.pieces(), begin = item % s.pieces() * kBackwardTokens;
    BackwardPiece(in, weights, s, batch, begin, std::min(s.time, begin + kBackwardTokens),
                  sums + item * sum_size, discarded.data<T>() + ThreadIndex() * sum_size);
  });
  if (in.d_final_state.defined()) AddFinalStateGradient<T>(in, s);
  // The sums over pieces, in order.
  for (int64_t item = 1; item < s.batch * s.pieces(); ++item) {
    for (int64_t i = 0; i < sum_size; ++i) sums[i] += sums[item * sum_size + i];
  }
  for (int64_t i = 0; i < s.channels && s.pieces() > 0; ++i) {
    for (int64_t k = 0; k < s.taps; ++k) {
      dw.data<T>()[i * s.taps + k] += sums[(taps - s.taps + k) * s.channels + i];
    }
    if (dbias.defined()) dbias.data<T>()[i] += sums[taps * s.channels + i];
  }
}

}  // namespace

void CausalConv1dSiluForward(Tensor y, Tensor final_state, Tensor x, Tensor w, Tensor bias,
                             Tensor initial_state, const Documents& documents, const Context& ctx) {
  OpScope op(ctx, OpFamily::kConv, "CausalConv1dSiluForward",
             {{"y", y},
              {"final_state", final_state},
              {"x", x},
              {"w", w},
              {"bias", bias},
              {"initial_state", initial_state},
              {"doc_start", documents.doc_start}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(CausalConv1dSiluForward(y, final_state, x, w, bias, initial_state, documents, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  y = wide.Out(y), final_state = wide.Out(final_state);
  x = wide.In(x), w = wide.In(w), bias = wide.In(bias), initial_state = wide.In(initial_state);
  const Sizes s = CheckInputs(op.name(), x, w, bias, initial_state, documents.doc_start);
  CheckRows(op.name(), {"y", y}, s);
  CheckState(op.name(), {"final_state", final_state}, s);
  cpu::DispatchFloat(x, op.name(), [&](auto zero) {
    ForwardCpu<decltype(zero)>(y, final_state, x, w, bias, initial_state, documents, s, op, ctx);
  });
}

void CausalConv1dSiluBackward(Tensor dx, Tensor dw, Tensor dbias, Tensor d_initial_state, Tensor dy,
                              Tensor d_final_state, Tensor x, Tensor w, Tensor bias,
                              Tensor initial_state, const Documents& documents,
                              const Context& ctx) {
  OpScope op(ctx, OpFamily::kConv, "CausalConv1dSiluBackward",
             {{"dx", dx},
              {"dw", dw},
              {"dbias", dbias},
              {"d_initial_state", d_initial_state},
              {"dy", dy},
              {"d_final_state", d_final_state},
              {"x", x},
              {"w", w},
              {"bias", bias},
              {"initial_state", initial_state},
              {"doc_start", documents.doc_start}});
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor partial = ctx.scratch->Alloc(
        DType::kF32, {cuda::CausalConv1dPartials(x.dim(0), x.dim(1)), (w.dim(1) + 1) * x.dim(2)});
    if (op.planning()) return;
    KRAIT_CUDA(CausalConv1dSiluBackward(dx, dw, dbias, d_initial_state, dy, d_final_state, x, w,
                                        bias, initial_state, documents, partial, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  dx = wide.Out(dx), d_initial_state = wide.Out(d_initial_state);
  dy = wide.In(dy), d_final_state = wide.In(d_final_state);
  x = wide.In(x), w = wide.In(w), bias = wide.In(bias), initial_state = wide.In(initial_state);
  const Sizes s = CheckInputs(op.name(), x, w, bias, initial_state, documents.doc_start);
  CheckRows(op.name(), {"dx", dx}, s);
  CheckRows(op.name(), {"dy", dy}, s);
  CheckState(op.name(), {"d_initial_state", d_initial_state}, s);
  CheckState(op.name(), {"d_final_state", d_final_state}, s);
  CheckDense(op.name(), {"dw", dw}, {s.channels, s.taps});
  if (dbias.defined()) CheckDense(op.name(), {"dbias", dbias}, {s.channels});
  cpu::DispatchFloat(x, op.name(), [&](auto zero) {
    BackwardCpu<decltype(zero)>(
        {dx, d_initial_state, dy, d_final_state, x, w, bias, initial_state, documents}, dw, dbias,
        s, op, ctx);
  });
}

}  // namespace krait
