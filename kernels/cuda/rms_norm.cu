// RMSNorm, forward and backward. Both are bound by memory: each row is read once, reduced, and
// written; statistics and sums are fp32.
//
// One block for each multiprocessor; its groups of blockDim.x threads take rows in turn. Thread x
// of a group holds the kVec columns from (x + i * blockDim.x) * kVec, i < kItems, of every row, and
// so keeps its weights and its sums of dw in registers. Rows are fetched into a ring in shared
// memory ahead of their use. Each thread fetches what it alone reads, so that the ring needs no
// barrier.
//
// Learned: beside bytes, what counts is the chain of each row (wait, sum, barrier, store): of 30
// instructions an element, backward, a third could go; and launches that overlap the end of the
// kernel before, 1 to 4 microseconds each. A named barrier for each group is 1 to 2 % faster than
// the block's, but racecheck takes it for none.
#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

// Threads of a block at most.
constexpr int kThreads = 512;

// The columns of this thread: access i holds kVec of them from At(i). With kExact, all threads have
// kItems accesses in every row, else some have fewer.
template <int kVec, int kItems, bool kExact>
struct Columns {
  int columns;
  __device__ int At(int item) const { return (threadIdx.x + item * blockDim.x) * kVec; }
  __device__ bool Has(int item) const { return kExact || At(item) < columns; }
};

// The next rows of kOperands tensors that this thread's group takes, in a ring of kStages stages.
constexpr int kRingBytes = 192 << 10;
template <typename T, int kVec, int kItems, int kOperands>
struct Ring {
  using Access = Pack<T, kVec>;
  static constexpr int kStageBytes =
      kThreads * kItems * kOperands * static_cast<int>(sizeof(Access));
  static constexpr int kStages = std::clamp(kRingBytes / kStageBytes, 1, 8);
  static constexpr int kAhead = kStages - 1;
  static constexpr int kBytes = kStages * kStageBytes;

  Access* slots;
  const T* from[kOperands];
  int64_t step[kOperands];  // to the group's next row
  int64_t left;             // rows that the group has yet to fetch
  int stage = 0;            // of the current row

  // The group's rows are first, first + rows_apart, ...
  __device__ Ring(const Rows<const T> (&operands)[kOperands], int64_t first, int64_t rows_apart,
                  int64_t rows) {
    extern __shared__ __align__(16) char dynamic[];
    slots = reinterpret_cast<Access*>(dynamic) + threadIdx.y * blockDim.x + threadIdx.x;
    left = first < rows ? (rows - 1 - first) / rows_apart + 1 : 0;
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      from[o] = operands[o][first] + threadIdx.x * kVec;
      step[o] = rows_apart * operands[o].stride;
    }
  }
  __device__ Access& Slot(int at_stage, int operand, int item) const {
    return slots[((at_stage * kOperands + operand) * kItems + item) * kThreads];
  }
  // An access of the current row, which must have arrived.
  __device__ const Access& At(int operand, int item) const { return Slot(stage, operand, item); }
  // Starts the copy of the next row, if there is one; one batch for the pipeline either way.
  template <typename C>
  __device__ void Fetch(int to_stage, const C& columns) {
    if (left > 0) {
#pragma unroll
      for (int o = 0; o < kOperands; ++o) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (columns.Has(i)) FetchAsync(&Slot(to_stage, o, i), from[o] + i * blockDim.x * kVec);
        }
        from[o] += step[o];
      }
    }
    --left;
    __pipeline_commit();
  }
  template <typename C>
  __device__ void Begin(const C& columns) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) Fetch(ahead, columns);
  }
  // Waits for the current row, with the fetch of a further one under way.
  template <typename C>
  __device__ void Arrive(const C& columns) {
    Fetch(stage == 0 ? kAhead : stage - 1, columns);
    __pipeline_wait_prior(kAhead);
  }
  __device__ void Advance() { stage = stage == kAhead ? 0 : stage + 1; }
};

// The weights of this thread's columns: in registers where there are few, else read when used.
template <int kVec, int kItems>
struct Weights {
  static constexpr bool kHeld = kVec * kItems <= 32;
  const float* w;
  Pack<float, kVec> held[kHeld ? kItems : 1];

  template <typename C>
  __device__ Weights(const float* weights, const C& columns) : w(weights) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (columns.Has(i)) held[i] = Load<kVec>(w + columns.At(i));
      }
    }
  }
  template <typename C>
  __device__ Pack<float, kVec> At(int item, const C& columns) const {
    if constexpr (kHeld) return held[item];
    return Load<kVec>(w + columns.At(item));
  }
};

template <typename T, int kVec, int kItems, bool kExact, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(Rows<T> h, Rows<T> y, float* rstd, Rows<const T> residual, Rows<const T> delta,
                  const float* w, int64_t rows, int cols, float eps) {
  constexpr int kOperands = kAdd ? 2 : 1;
  __shared__ float shared[2][kThreads / 32];
  StartDependent();
  const Columns<kVec, kItems, kExact> columns{cols};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  Rows<const T> operands[kOperands];
  operands[0] = residual;
  if constexpr (kAdd) operands[1] = delta;
  Ring<T, kVec, kItems, kOperands> ring(operands, row, step, rows);
  ring.Begin(columns);
  const Weights<kVec, kItems> weights(w, columns);
  const float inverse_cols = 1.0f / static_cast<float>(cols);
  // The groups of a block go round together, the last time perhaps without a row for some.
  for (int parity = 0; row - threadIdx.y < rows; row += step, parity ^= 1) {
    ring.Arrive(columns);
    const bool has_row = row < rows;
    Pack<T, kVec> x[kItems];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has_row || !columns.Has(i)) continue;
      x[i] = ring.At(0, i);
      if constexpr (kAdd) {
        Pack<float, kVec> sum = Widen(x[i]);
        const Pack<float, kVec> added = Widen(ring.At(1, i));
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum.v[j] += added.v[j];
        x[i] = Round<T>(sum);
        Store(h[row] + columns.At(i), x[i]);
      }
      const Pack<float, kVec> wide = Widen(x[i]);
#pragma unroll
      for (int j = 0; j < kVec; ++j) squares += wide.v[j] * wide.v[j];
    }
    const float sum = GroupSum(squares, shared[parity]);
    const float nan = __int_as_float(0x7fffffff);
    const float scale = isfinite(sum) ? 1.0f / sqrtf(sum * inverse_cols + eps) : nan;
    if (has_row && threadIdx.x == 0) rstd[row] = scale;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has_row || !columns.Has(i)) continue;
      const Pack<float, kVec> weight = weights.At(i, columns);
      Pack<float, kVec> out = Widen(x[i]);
#pragma unroll
      for (int j = 0; j < kVec; ++j) out.v[j] *= scale * weight.v[j];
      Store(y[row] + columns.At(i), Round<T>(out));
    }
    ring.Advance();
  }
}

// Block b writes its rows' sum of dy * xhat to partial[b].
template <typename T, int kVec, int kItems, bool kExact, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(Rows<T> dx, Rows<float> partial, Rows<const T> dy, Rows<const T> dx_in,
                   Rows<const T> x, const float* rstd, const float* w, int64_t rows, int cols) {
  constexpr int kOperands = kAdd ? 3 : 2;
  __shared__ float shared[2][kThreads / 32];
  StartDependent();
  const Columns<kVec, kItems, kExact> columns{cols};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  Rows<const T> operands[kOperands];
  operands[0] = x;
  operands[1] = dy;
  if constexpr (kAdd) operands[2] = dx_in;
  Ring<T, kVec, kItems, kOperands> ring(operands, row, step, rows);
  ring.Begin(columns);
  const Weights<kVec, kItems> weights(w, columns);
  const float inverse_cols = 1.0f / static_cast<float>(cols);
  float next_scale = row < rows ? rstd[row] : 0.0f;
  Pack<float, kVec> dw_sum[kItems] = {};
  for (int parity = 0; row - threadIdx.y < rows; row += step, parity ^= 1) {
    ring.Arrive(columns);
    const bool has_row = row < rows;
    const float scale = next_scale;
    if (row + step < rows) next_scale = rstd[row + step];

    float dot = 0.0f;  // of g = dy * w and xhat
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has_row || !columns.Has(i)) continue;
      const Pack<float, kVec> x_now = Widen(ring.At(0, i)), dy_now = Widen(ring.At(1, i));
      const Pack<float, kVec> weight = weights.At(i, columns);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float product = dy_now.v[j] * (x_now.v[j] * scale);
        dw_sum[i].v[j] += product;
        dot += product * weight.v[j];
      }
    }
    const float sum = GroupSum(dot, shared[parity]);
    // dx = rstd * dy * w - x * (rstd^2 * mean)
    const float x_factor = -scale * scale * (sum * inverse_cols);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!has_row || !columns.Has(i)) continue;
      const Pack<float, kVec> x_now = Widen(ring.At(0, i)), dy_now = Widen(ring.At(1, i));
      const Pack<float, kVec> weight = weights.At(i, columns);
      Pack<float, kVec> out = {};
      if constexpr (kAdd) out = Widen(ring.At(2, i));
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        out.v[j] += scale * (dy_now.v[j] * weight.v[j]) + x_now.v[j] * x_factor;
      }
      Store(dx[row] + columns.At(i), Round<T>(out));
    }
    ring.Advance();
  }

  // The block's sum over its groups, in order; the ring has room for kItems accesses of floats.
  if (blockDim.y > 1) {
    extern __shared__ __align__(16) char dynamic[];
    auto* const sums = reinterpret_cast<Pack<float, kVec>*>(dynamic);
    __syncthreads();  // the ring is read to the end
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sums[(threadIdx.y * kItems + i) * blockDim.x + threadIdx.x] = dw_sum[i];
    }
    __syncthreads();
    // Access `at` of the row, by whichever thread comes to it.
    const int accesses = kItems * blockDim.x;
    for (int at = threadIdx.y * blockDim.x + threadIdx.x; at < accesses;
         at += blockDim.x * blockDim.y) {
      Pack<float, kVec> total = sums[at];
      for (int g = 1; g < blockDim.y; ++g) {
        const Pack<float, kVec> other = sums[g * accesses + at];
#pragma unroll
        for (int j = 0; j < kVec; ++j) total.v[j] += other.v[j];
      }
      if (at * kVec < cols) Store(partial[blockIdx.x] + at * kVec, total);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (columns.Has(i)) Store(partial[blockIdx.x] + columns.At(i), dw_sum[i]);
  }
}

// Calls run(vec, items, exact, threads), the first three as std::integral_constant, for rows of
// `cols`.
template <typename T, typename Run>
void ForRowShape(int64_t cols, bool vectorizable, const Run& run) {
  const auto with_items = [&](auto vec, auto items) {
    constexpr int kVec = decltype(vec)::value, kItems = decltype(items)::value;
    const int64_t accesses = (cols + kVec - 1) / kVec;
    const int64_t x = (accesses + kItems * 32 - 1) / (kItems * 32) * 32;
    const dim3 threads(static_cast<unsigned>(x), static_cast<unsigned>(kThreads / x));
    if constexpr (kVec > 1 && kItems <= 4) {
      if (x * kItems == accesses) return run(vec, items, std::true_type(), threads);
    }
    run(vec, items, std::false_type(), threads);
  };
  const auto longest = [&](int64_t limit) {
    if (cols <= limit) return;
    KRAIT_FATAL("RmsNorm on CUDA takes rows of at most " + std::to_string(limit) +
                " columns of this alignment, not " + std::to_string(cols));
  };
  if (vectorizable) {
    constexpr int kVec = kVectorOf<T>;
    constexpr std::integral_constant<int, kVec> vec;
    longest(8 * kThreads * kVec);
    if (cols <= 32 * kVec) {
      with_items(vec, std::integral_constant<int, 1>());
    } else if (cols <= 64 * kVec) {
      with_items(vec, std::integral_constant<int, 2>());
    } else if (cols <= 4 * kThreads * kVec) {
      with_items(vec, std::integral_constant<int, 4>());
    } else {
      with_items(vec, std::integral_constant<int, 8>());
    }
  } else {
    constexpr std::integral_constant<int, 1> vec;
    longest(16 * kThreads);
    if (cols <= 4 * kThreads) {
      with_items(vec, std::integral_constant<int, 4>());
    } else {
      with_items(vec, std::integral_constant<int, 16>());
    }
  }
}

// All of `like` have the rows, columns and dtype of x.
void CheckShapes(const Tensor& x, std::initializer_list<Tensor> like, const Tensor& rstd,
                 const Tensor& w) {
  KRAIT_CHECK(x.dtype() == DType::kF32 || x.dtype() == DType::kBF16);
  for (const Tensor& t : like) {
    KRAIT_CHECK(t.dtype() == x.dtype() && t.rows() == x.rows() && t.dim(-1) == x.dim(-1));
  }
  KRAIT_CHECK(w.dtype() == DType::kF32 && w.numel() == x.dim(-1) && w.contiguous());
  KRAIT_CHECK(rstd.dtype() == DType::kF32 && rstd.numel() == x.rows() && rstd.contiguous());
}

int64_t Blocks(int64_t rows, dim3 threads) {
  return std::min(kNormBlocks, (rows + threads.y - 1) / threads.y);
}

template <typename T, bool kAdd>
void Forward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta, Tensor w, double eps,
             const Context& ctx) {
  const bool vectorizable = Vectorizable(h) && Vectorizable(y) && Vectorizable(residual) &&
                            (!kAdd || Vectorizable(delta)) && Vectorizable(w);
  const int64_t rows = residual.rows(), cols = residual.dim(-1);
  ForRowShape<T>(cols, vectorizable, [&](auto vec, auto items, auto exact, dim3 threads) {
    Launch("RmsNormForward", ForwardKernel<T, vec, items, exact, kAdd>,
           Dependent(Blocks(rows, threads)), threads, Ring < T, vec, items, kAdd ? 2 : 1 > ::kBytes,
           ctx, RowsOf<T>(h), RowsOf<T>(y), rstd.device_data<float>(), RowsOf<const T>(residual),
           kAdd ? RowsOf<const T>(delta) : Rows<const T>{nullptr, 0},
           static_cast<const float*>(w.device_data<float>()), rows, static_cast<int>(cols),
           static_cast<float>(eps));
  });
}

template <typename T, bool kAdd>
void Backward(Tensor dx, Tensor dw, Tensor dy, Tensor dx_in, Tensor x, Tensor rstd, Tensor w,
              Tensor partial, const Context& ctx) {
  const bool vectorizable = Vectorizable(dx) && Vectorizable(dy) && Vectorizable(x) &&
                            (!kAdd || Vectorizable(dx_in)) && Vectorizable(w);
  const int64_t rows = x.rows(), cols = x.dim(-1);
  ForRowShape<T>(cols, vectorizable, [&](auto vec, auto items, auto exact, dim3 threads) {
    const int64_t blocks = Blocks(rows, threads);
    KRAIT_CHECK(partial.dim(0) >= blocks && partial.dim(1) == cols);
    Launch("RmsNormBackward", BackwardKernel<T, vec, items, exact, kAdd>, Dependent(blocks),
           threads, Ring < T, vec, items, kAdd ? 3 : 2 > ::kBytes, ctx, RowsOf<T>(dx),
           RowsOf<float>(partial), RowsOf<const T>(dy),
           kAdd ? RowsOf<const T>(dx_in) : Rows<const T>{nullptr, 0}, RowsOf<const T>(x),
           static_cast<const float*>(rstd.device_data<float>()),
           static_cast<const float*>(w.device_data<float>()), rows, static_cast<int>(cols));
    AddColumnSums("RmsNormBackward column sums", VectorPlace{dw.device_data<float>()}, partial,
                  blocks, ctx);
  });
}

}  // namespace

void RmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta, Tensor w,
                    double eps, const Context& ctx) {
  if (residual.numel() == 0) return;
  CheckShapes(residual, {h, y, delta.defined() ? delta : residual}, rstd, w);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    if (delta.defined()) {
      Forward<T, true>(h, y, rstd, residual, delta, w, eps, ctx);
    } else {
      Forward<T, false>(h, y, rstd, residual, delta, w, eps, ctx);
    }
  };
  residual.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor dx_in, Tensor x, Tensor rstd, Tensor w,
                     Tensor partial, const Context& ctx) {
  if (x.numel() == 0) return;
  CheckShapes(x, {dx, dy, dx_in.defined() ? dx_in : x}, rstd, w);
  KRAIT_CHECK(dw.dtype() == DType::kF32 && dw.numel() == x.dim(-1) && dw.contiguous());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    if (dx_in.defined()) {
      Backward<T, true>(dx, dw, dy, dx_in, x, rstd, w, partial, ctx);
    } else {
      Backward<T, false>(dx, dw, dy, dx_in, x, rstd, w, partial, ctx);
    }
  };
  x.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

}  // namespace krait::cuda
