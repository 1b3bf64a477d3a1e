// Causal depthwise convolution with SiLU, forward and backward, bound by memory.
//
// A lane owns kVec neighbouring channels and walks down the time of its warp's piece with the last
// inputs in registers; so every input is read once, but for the K-1 tokens before a piece, which
// the warp beside it has in the cache. Tokens are fetched into a ring in shared memory ahead of
// their use; each thread fetches what it alone reads, so that the ring needs no barrier, and
// registers are left for the window, the weights and the sums. Backward, a piece also visits the
// K-1 tokens after it, whose gradients reach back into it. The loops know 4 or 8 taps: shorter
// kernels have zero taps in front.
//
// Learned: instructions are the second limit (30 an element, forward, ran at 3.3 a cycle and 83 %
// of the copy). What varies at the ends of a piece only is kept out of the loop over its middle.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/causal_conv1d.h"
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kWarps = kConvWarps;
constexpr int kNoStart = INT32_MIN;  // no document cuts anything off

// A tensor [B,T,I] with unit inner stride; [B,K-1,I] for states. Null when undefined.
template <typename T>
struct Sequence {
  T* data;
  int64_t batch_stride, stride;
  __device__ T* At(int batch, int64_t position, int channel) const {
    return data + batch * batch_stride + position * stride + channel;
  }
};
template <typename T>
Sequence<T> SequenceOf(const Tensor& t) {
  if (!t.defined()) return {nullptr, 0, 0};
  return {t.device_data<std::remove_const_t<T>>(), t.stride(0), t.stride(1)};
}

template <typename T>
struct Inputs {
  Sequence<const T> x, initial_state;
  const T *w, *bias;         // [I,K]; [I] or null
  const int32_t* doc_start;  // [B,T] or null
  int64_t first_position;
  int time, channels, taps;

  // The position, as counted in this call, from which on token t sees its inputs.
  __device__ int Start(int batch, int t) const {
    if (doc_start == nullptr) return kNoStart;
    return static_cast<int>(doc_start[static_cast<int64_t>(batch) * time + t] - first_position);
  }
  // What a token that sees positions from `start` on finds at `position`.
  template <int kVec>
  __device__ Pack<T, kVec> At(int batch, int position, int start, int channel) const {
    if (position < start) return {};
    if (position >= 0) return Load<kVec>(x.At(batch, position, channel));
    if (initial_state.data == nullptr || position + taps - 1 < 0) return {};
    return Load<kVec>(initial_state.At(batch, position + taps - 1, channel));
  }
};

// The weights and the bias of a lane's channels.
template <typename T, int kVec, int kTaps>
struct Taps {
  Pack<float, kVec> w[kTaps], bias;
  __device__ Taps(const Inputs<T>& in, int channel) {
    const int pad = kTaps - in.taps;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      bias.v[j] = in.bias != nullptr ? ToFloat(in.bias[channel + j]) : 0.0f;
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        w[k].v[j] =
            k >= pad ? ToFloat(in.w[static_cast<int64_t>(channel + j) * in.taps + k - pad]) : 0.0f;
      }
    }
  }
};

// The inputs of the current token and the kTaps - 1 before it.
template <typename T, int kVec, int kTaps>
struct Window {
  Pack<float, kVec> x[kTaps];
  // As it stands before token t.
  __device__ void Fill(const Inputs<T>& in, int batch, int t, int channel) {
    const int start = t < in.time ? in.Start(batch, t) : kNoStart;
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k) {
      x[k + 1] = Widen(in.template At<kVec>(batch, t - kTaps + 1 + k, start, channel));
    }
  }
  __device__ void Push(const Pack<T, kVec>& next) {
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k) x[k] = x[k + 1];
    x[kTaps - 1] = Widen(next);
  }
  // The token that comes next begins a document.
  __device__ void Forget() {
#pragma unroll
    for (int k = 1; k < kTaps; ++k) x[k] = {};
  }
  __device__ Pack<float, kVec> Convolve(const Taps<T, kVec, kTaps>& taps) const {
    Pack<float, kVec> u = taps.bias;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) u.v[j] += taps.w[k].v[j] * x[k].v[j];
    }
    return u;
  }
};

// This warp's piece of a row, its tokens [begin, end), and this lane's first channel.
struct Piece {
  int batch, begin, end, channel;
  __device__ Piece(int vec, int time) {
    batch = blockIdx.z;
    channel = (blockIdx.x * 32 + threadIdx.x) * vec;
    begin = (blockIdx.y * kWarps + threadIdx.y) * static_cast<int>(kConvWarpTokens);
    end = min(time, begin + static_cast<int>(kConvWarpTokens));
  }
};

// The next tokens of kOperands sequences for each thread; counts tokens from the piece's first.
template <typename T, int kVec, int kOperands>
struct Ring {
  static constexpr int kStages = sizeof(Pack<T, kVec>) * kOperands > 16 ? 4 : 8;
  static constexpr int kAhead = kStages - 1;
  Pack<T, kVec> slots[kStages][kOperands][kWarps][32];

  __device__ Pack<T, kVec>& At(int stage, int operand) {
    return slots[stage][operand][threadIdx.y][threadIdx.x];
  }
};

// The addresses from which a thread fetches, token by token.
template <typename T, int kVec, int kOperands>
struct Fetcher {
  Ring<T, kVec, kOperands>& ring;
  const T* from[kOperands];
  int64_t stride[kOperands];
  int left;  // tokens to come

  __device__ Fetcher(Ring<T, kVec, kOperands>& to, int tokens) : ring(to), left(tokens) {}
  __device__ void Begin(int operand, const Sequence<const T>& sequence, const Piece& piece) {
    from[operand] = sequence.At(piece.batch, piece.begin, piece.channel);
    stride[operand] = sequence.stride;
  }
  // Starts the copy of the next token, if there is one; one batch for the pipeline either way.
  __device__ void Next(int stage) {
    if (left > 0) {
#pragma unroll
      for (int o = 0; o < kOperands; ++o) {
        FetchAsync(&ring.At(stage, o), from[o]);
        from[o] += stride[o];
      }
    }
    --left;
    __pipeline_commit();
  }
};

// The document starts of a block's tokens and the kTaps - 1 after them.
template <int kTaps>
struct Starts {
  int of[kWarps * kConvWarpTokens + kTaps - 1];
  template <typename T>
  __device__ void Fill(const Inputs<T>& in, int batch) {
    constexpr int kTokens = sizeof(of) / sizeof(int);
    const int begin = blockIdx.y * kWarps * static_cast<int>(kConvWarpTokens);
    for (int i = threadIdx.y * 32 + threadIdx.x; i < kTokens; i += 32 * kWarps) {
      of[i] = begin + i < in.time ? in.Start(batch, begin + i) : kNoStart;
    }
    __syncthreads();
  }
  // Token `i` of this warp's piece.
  __device__ int Of(int i) const { return of[threadIdx.y * kConvWarpTokens + i]; }
};

template <typename T, int kVec, int kTaps, bool kDocuments>
__global__ void __launch_bounds__(32 * kWarps)
    ForwardKernel(Sequence<T> y, Sequence<T> final_state, Inputs<T> in) {
  using R = Ring<T, kVec, 1>;
  __shared__ R ring;
  __shared__ Starts<kDocuments ? kTaps : 1> starts;
  StartDependent();
  const Piece piece(kVec, in.time);
  if constexpr (kDocuments) starts.Fill(in, piece.batch);
  if (piece.begin >= piece.end || piece.channel >= in.channels) return;
  const int batch = piece.batch, channel = piece.channel, tokens = piece.end - piece.begin;
  Fetcher<T, kVec, 1> fetcher(ring, tokens);
  fetcher.Begin(0, in.x, piece);
#pragma unroll
  for (int stage = 0; stage < R::kAhead; ++stage) fetcher.Next(stage);
  const Taps<T, kVec, kTaps> taps(in, channel);
  Window<T, kVec, kTaps> window;
  window.Fill(in, batch, piece.begin, channel);
  T* to = y.At(batch, piece.begin, channel);
  const auto visit = [&](int i, int stage) {
    fetcher.Next((stage + R::kAhead) % R::kStages);
    __pipeline_wait_prior(R::kAhead);
    if (kDocuments && starts.Of(i) == piece.begin + i) window.Forget();
    window.Push(ring.At(stage, 0));
    Pack<float, kVec> u = window.Convolve(taps);
#pragma unroll
    for (int j = 0; j < kVec; ++j) u.v[j] *= Sigmoid(u.v[j]);
    Store(to, Round<T>(u));
    to += y.stride;
  };
  int base = 0;
  for (; base + R::kStages <= tokens; base += R::kStages) {
#pragma unroll
    for (int stage = 0; stage < R::kStages; ++stage) visit(base + stage, stage);
  }
#pragma unroll
  for (int stage = 0; stage < R::kStages; ++stage) {
    if (base + stage < tokens) visit(base + stage, stage);
  }
  if (final_state.data == nullptr || piece.end != in.time) return;
  const int start = in.Start(batch, in.time - 1);
  for (int j = 0; j < in.taps - 1; ++j) {
    Store(final_state.At(batch, j, channel),
          in.template At<kVec>(batch, in.time - in.taps + 1 + j, start, channel));
  }
}

template <typename T>
struct Gradients {
  Sequence<T> dx, d_initial_state;
  Sequence<const T> dy, d_final_state;
  Rows<float> partial;  // [.., (K+1) * I]: of dw as [K,I], then of dbias
};

template <typename T, int kVec, int kTaps, bool kDocuments>
__global__ void __launch_bounds__(32 * kWarps) BackwardKernel(Gradients<T> out, Inputs<T> in) {
  using R = Ring<T, kVec, 2>;
  __shared__ union {
    R ring;
    Pack<float, kVec> sums[kTaps + 1][kWarps][32];
  } shared;
  __shared__ Starts<kDocuments ? kTaps : 1> starts;
  StartDependent();
  R& ring = shared.ring;
  const Piece piece(kVec, in.time);
  const int batch = piece.batch, channel = piece.channel;
  const int pad = kTaps - in.taps;
  if constexpr (kDocuments) starts.Fill(in, batch);
  Pack<float, kVec> sums[kTaps + 1] = {};
  if (piece.begin < piece.end && channel < in.channels) {
    const int tokens = piece.end - piece.begin;
    const int visited = tokens + kTaps - 1;  // those beyond the row have no gradient
    Fetcher<T, kVec, 2> fetcher(ring, min(in.time - piece.begin, visited));
    fetcher.Begin(0, in.x, piece);
    fetcher.Begin(1, out.dy, piece);
#pragma unroll
    for (int stage = 0; stage < R::kAhead; ++stage) fetcher.Next(stage);
    const Taps<T, kVec, kTaps> taps(in, channel);
    Window<T, kVec, kTaps> window;
    window.Fill(in, batch, piece.begin, channel);
    Pack<float, kVec> pending[kTaps] = {};  // gradients of the window's inputs
    T* to = out.dx.At(batch, piece.begin, channel);

    // Token i of the piece, from the ring; pending[0] is complete after it.
    const auto visit = [&](int i, int stage, bool owned, bool exists) {
      fetcher.Next((stage + R::kAhead) % R::kStages);
      __pipeline_wait_prior(R::kAhead);
      Pack<T, kVec> x = {}, dy = {};
      if (exists) x = ring.At(stage, 0), dy = ring.At(stage, 1);
      int seen = kTaps;  // inputs that the token sees, itself included
      if (kDocuments && exists) {
        seen = min(kTaps, piece.begin + i - starts.Of(i) + 1);
        if (seen == 1) window.Forget();
      }
      window.Push(x);
      const Pack<float, kVec> u = window.Convolve(taps);
      Pack<float, kVec> du;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float s = Sigmoid(u.v[j]);
        du.v[j] = ToFloat(dy.v[j]) * s * (1.0f + u.v[j] * (1.0f - s));
      }
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const bool sees = !kDocuments || kTaps - k <= seen;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float before = k + 1 < kTaps ? pending[k + 1].v[j] : 0.0f;
          pending[k].v[j] = sees ? before + du.v[j] * taps.w[k].v[j] : before;
        }
      }
      if (!owned) return;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sums[kTaps].v[j] += du.v[j];
#pragma unroll
        for (int k = 0; k < kTaps; ++k) sums[k].v[j] += du.v[j] * window.x[k].v[j];
      }
    };
    // pending[0], which belongs to the token kTaps - 1 before token i, at the ends of the piece.
    const auto finish = [&](int i) {
      const int position = piece.begin + i - kTaps + 1;
      if (i < kTaps - 1 && (position >= 0 || position + in.taps - 1 < 0))
        return;  // not this piece's
      Pack<float, kVec> gradient = pending[0];
      const int from_end = position - (in.time - in.taps + 1);
      if (from_end >= 0 && out.d_final_state.data != nullptr &&
          position >= in.Start(batch, in.time - 1)) {
        const Pack<float, kVec> d =
            Widen(Load<kVec>(out.d_final_state.At(batch, from_end, channel)));
#pragma unroll
        for (int j = 0; j < kVec; ++j) gradient.v[j] += d.v[j];
      }
      if (position >= 0) {
        Store(to, Round<T>(gradient));
        to += out.dx.stride;
      } else if (out.d_initial_state.data != nullptr) {
        Store(out.d_initial_state.At(batch, position + in.taps - 1, channel), Round<T>(gradient));
      }
    };

    int base = 0;
    // The first tokens complete what lies before the piece, the last ones may be beyond the row.
    const auto ends = [&](int last) {
      for (; base < last; base += R::kStages) {
#pragma unroll
        for (int stage = 0; stage < R::kStages; ++stage) {
          const int i = base + stage;
          if (i >= visited) continue;
          visit(i, stage, i < tokens, piece.begin + i < in.time);
          finish(i);
        }
      }
    };
    ends(kTaps - 1);
    for (; base + R::kStages <= tokens; base += R::kStages) {
#pragma unroll
      for (int stage = 0; stage < R::kStages; ++stage) {
        visit(base + stage, stage, true, true);
        Store(to, Round<T>(pending[0]));
        to += out.dx.stride;
      }
    }
    ends(visited);
  }
  // The block's sums over its warps, in order.
  __syncthreads();
#pragma unroll
  for (int k = 0; k <= kTaps; ++k) shared.sums[k][threadIdx.y][threadIdx.x] = sums[k];
  __syncthreads();
  if (channel >= in.channels) return;
  const int64_t block = static_cast<int64_t>(batch) * gridDim.y + blockIdx.y;
  for (int k = pad + threadIdx.y; k <= kTaps; k += kWarps) {
    Pack<float, kVec> sum = shared.sums[k][0][threadIdx.x];
    for (int warp = 1; warp < kWarps; ++warp) {
      const Pack<float, kVec> other = shared.sums[k][warp][threadIdx.x];
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum.v[j] += other.v[j];
    }
    Store(out.partial[block] + static_cast<int64_t>(k - pad) * in.channels + channel, sum);
  }
}

// Where the sums of a row of `partial` go.
struct WeightPlace {
  float *dw, *dbias;
  int64_t channels, taps;
  __device__ float* operator()(int64_t col) const {
    const int64_t k = col / channels, channel = col % channels;
    return k < taps ? dw + channel * taps + k : dbias + channel;
  }
};

void CheckRows(const Tensor& t, const Tensor& x) {
  KRAIT_CHECK(t.rank() == 3 && t.dtype() == x.dtype() && t.dim(0) == x.dim(0) &&
              t.dim(1) == x.dim(1) && t.dim(2) == x.dim(2) && t.stride(2) == 1);
}

void CheckState(const Tensor& t, const Tensor& x, const Tensor& w) {
  if (!t.defined()) return;
  KRAIT_CHECK(t.rank() == 3 && t.dtype() == x.dtype() && t.dim(0) == x.dim(0) &&
              t.dim(1) == w.dim(1) - 1 && t.dim(2) == x.dim(2) && t.contiguous());
}

template <typename T>
Inputs<T> InputsOf(Tensor x, Tensor w, Tensor bias, Tensor initial_state,
                   const Documents& documents) {
  KRAIT_CHECK(x.dim(1) <= INT32_MAX - 64 && w.dtype() == x.dtype() && w.contiguous());
  KRAIT_CHECK(w.dim(0) == x.dim(2) && w.dim(1) >= 1 && w.dim(1) <= 8);
  KRAIT_CHECK(!bias.defined() || (bias.numel() == x.dim(2) && bias.contiguous()));
  CheckRows(x, x);
  CheckState(initial_state, x, w);
  const Tensor& starts = documents.doc_start;
  KRAIT_CHECK(!starts.defined() || (starts.rank() == 2 && starts.dim(0) == x.dim(0) &&
                                    starts.dim(1) == x.dim(1) && starts.contiguous()));
  return {SequenceOf<const T>(x),
          SequenceOf<const T>(initial_state),
          w.device_data<T>(),
          bias.defined() ? bias.device_data<T>() : nullptr,
          starts.defined() ? starts.device_data<int32_t>() : nullptr,
          documents.first_position,
          static_cast<int>(x.dim(1)),
          static_cast<int>(x.dim(2)),
          static_cast<int>(w.dim(1))};
}

bool AllVectorizable(std::initializer_list<Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
    if (!t.defined() || t.numel() == 0) return true;
    const int64_t per_access = 16 / SizeOf(t.dtype());
    return Vectorizable(t) && t.stride(0) % per_access == 0;
  });
}

Grid Blocks(const Tensor& x, int vec) {
  const int64_t tokens = kConvWarps * kConvWarpTokens;
  return Dependent((x.dim(2) + 32 * vec - 1) / (32 * vec), (x.dim(1) + tokens - 1) / tokens,
                   x.dim(0));
}

// Calls run(T{}, vec, taps, documents), the last three as std::integral_constant; vec is
// `bf16_vec` for aligned bf16.
template <int bf16_vec, typename Run>
void Dispatch(const Tensor& x, const Tensor& w, const Documents& documents, bool vectorizable,
              const Run& run) {
  const auto with_taps = [&](auto zero, auto vec, auto taps) {
    documents.doc_start.defined() ? run(zero, vec, taps, std::true_type())
                                  : run(zero, vec, taps, std::false_type());
  };
  const auto with_vec = [&](auto zero, auto vec) {
    w.dim(1) <= 4 ? with_taps(zero, vec, std::integral_constant<int, 4>())
                  : with_taps(zero, vec, std::integral_constant<int, 8>());
  };
  const auto with_type = [&](auto zero, auto vec) {
    vectorizable ? with_vec(zero, vec) : with_vec(zero, std::integral_constant<int, 1>());
  };
  KRAIT_CHECK(x.dtype() == DType::kF32 || x.dtype() == DType::kBF16);
  x.dtype() == DType::kBF16 ? with_type(BF16(), std::integral_constant<int, bf16_vec>())
                            : with_type(0.0f, std::integral_constant<int, 4>());
}

}  // namespace

void CausalConv1dSiluForward(Tensor y, Tensor final_state, Tensor x, Tensor w, Tensor bias,
                             Tensor initial_state, const Documents& documents, const Context& ctx) {
  if (x.numel() == 0) return;
  CheckRows(y, x);
  CheckState(final_state, x, w);
  Dispatch<8>(x, w, documents, AllVectorizable({y, final_state, x, initial_state}),
              [&](auto zero, auto vec, auto taps, auto has_documents) {
                using T = decltype(zero);
                Launch("CausalConv1dSiluForward", ForwardKernel<T, vec, taps, has_documents>,
                       Blocks(x, vec), dim3(32, kWarps), 0, ctx, SequenceOf<T>(y),
                       SequenceOf<T>(final_state),
                       InputsOf<T>(x, w, bias, initial_state, documents));
              });
}

void CausalConv1dSiluBackward(Tensor dx, Tensor dw, Tensor dbias, Tensor d_initial_state, Tensor dy,
                              Tensor d_final_state, Tensor x, Tensor w, Tensor bias,
                              Tensor initial_state, const Documents& documents, Tensor partial,
                              const Context& ctx) {
  if (x.numel() == 0) return;
  CheckRows(dx, x);
  CheckRows(dy, x);
  CheckState(d_initial_state, x, w);
  CheckState(d_final_state, x, w);
  const int64_t channels = x.dim(2), taps = w.dim(1);
  const int64_t partials = CausalConv1dPartials(x.dim(0), x.dim(1));
  KRAIT_CHECK(dw.numel() == w.numel() && dw.contiguous());
  KRAIT_CHECK(!dbias.defined() || (dbias.numel() == channels && dbias.contiguous()));
  KRAIT_CHECK(partial.dim(0) == partials && partial.dim(1) == (taps + 1) * channels);
  Dispatch<4>(x, w, documents,
              AllVectorizable({dx, dy, d_initial_state, d_final_state, x, initial_state, partial}),
              [&](auto zero, auto vec, auto padded_taps, auto has_documents) {
                using T = decltype(zero);
                const Gradients<T> out = {
                    SequenceOf<T>(dx), SequenceOf<T>(d_initial_state), SequenceOf<const T>(dy),
                    SequenceOf<const T>(d_final_state), RowsOf<float>(partial)};
                Launch("CausalConv1dSiluBackward",
                       BackwardKernel<T, vec, padded_taps, has_documents>, Blocks(x, vec),
                       dim3(32, kWarps), 0, ctx, out,
                       InputsOf<T>(x, w, bias, initial_state, documents));
              });
  const int64_t sums = (dbias.defined() ? taps + 1 : taps) * channels;
  AddColumnSums("CausalConv1dSiluBackward sums",
                WeightPlace{dw.device_data<float>(),
                            dbias.defined() ? dbias.device_data<float>() : nullptr, channels, taps},
                partial.Slice(1, 0, sums), partials, ctx);
}

}  // namespace krait::cuda
