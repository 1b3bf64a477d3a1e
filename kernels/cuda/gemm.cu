// Matrix products for what the fast paths refuse, and the bias of a linear layer.
//
// The plain kernel is bound by f32 arithmetic and shared memory, a tenth of cuBLASLt's f32 rate and
// more; it is there to be right for every size, stride and address.
#include <string>
#include <type_traits>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256;  // 4 x 4 outputs of a thread

// An operand of which element (row, column) lies at data[row * row_stride + column *
// column_stride]; a grouped one has `expert_stride` elements from one expert to the next.
template <typename T>
struct Matrix {
  T* data;
  int64_t row_stride, column_stride, expert_stride;
};

enum class Ragged { kNone, kRows, kSum };

// c[m,n] = sum over k of a(m,k) b(k,n) (+ bias[n]). Ragged::kRows: rows [offsets[e], offsets[e+1])
// of a and c with b of expert e. Ragged::kSum: c of expert e from k in [offsets[e], offsets[e+1]).
template <typename In, typename Out>
struct Problem {
  Matrix<const In> a, b;
  Matrix<Out> c;
  int64_t m, n, k;
  const int64_t* offsets;
  int experts;
  bool accumulate;
  const Out* bias;  // may be null
};

template <Ragged kRagged, typename In, typename Out>
__global__ void __launch_bounds__(kThreads) PlainKernel(Problem<In, Out> p) {
  __shared__ float shared_a[kDepth][kTile + 1], shared_b[kDepth][kTile + 1];
  const int64_t tiles_n = (p.n + kTile - 1) / kTile, tiles_m = (p.m + kTile - 1) / kTile;
  const int64_t first_n = blockIdx.x % tiles_n * kTile;
  const int64_t first_m = blockIdx.x / tiles_n % tiles_m * kTile;
  int64_t expert = blockIdx.x / tiles_n / tiles_m;
  int64_t begin = 0, end = p.k, last_m = p.m;
  if constexpr (kRagged == Ragged::kRows) {
    // Segments begin at multiples of the tile, so that a tile has rows of one expert.
    while (expert < p.experts && first_m >= p.offsets[expert + 1]) ++expert;
    if (expert == p.experts) return;
    last_m = min(p.m, p.offsets[expert + 1]);
  } else if constexpr (kRagged == Ragged::kSum) {
    begin = p.offsets[expert], end = p.offsets[expert + 1];
  }
  const In* b = p.b.data + (kRagged == Ragged::kRows ? expert * p.b.expert_stride : 0);
  Out* c = p.c.data + (kRagged == Ragged::kSum ? expert * p.c.expert_stride : 0);

  const int thread_m = threadIdx.x / 16, thread_n = threadIdx.x % 16;
  float sum[4][4] = {};
  for (int64_t at = begin; at < end; at += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      // Neighbouring threads read along the operand's unit stride.
      const bool a_along_k = p.a.column_stride == 1, b_along_k = p.b.row_stride == 1;
      const int am = a_along_k ? i / kDepth : i % kTile, ak = a_along_k ? i % kDepth : i / kTile;
      const int bn = b_along_k ? i / kDepth : i % kTile, bk = b_along_k ? i % kDepth : i / kTile;
      const bool a_inside = first_m + am < last_m && at + ak < end;
      const bool b_inside = first_n + bn < p.n && at + bk < end;
      shared_a[ak][am] =
          a_inside
              ? ToFloat(p.a.data[(first_m + am) * p.a.row_stride + (at + ak) * p.a.column_stride])
              : 0.0f;
      shared_b[bk][bn] =
          b_inside ? ToFloat(b[(at + bk) * p.b.row_stride + (first_n + bn) * p.b.column_stride])
                   : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = shared_a[k][thread_m + 16 * i];
        right[i] = shared_b[k][thread_n + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first_m + thread_m + 16 * i, column = first_n + thread_n + 16 * j;
      if (row >= last_m || column >= p.n) continue;
      Out* const to = c + row * p.c.row_stride + column;
      const float result = p.bias != nullptr ? sum[i][j] + ToFloat(p.bias[column]) : sum[i][j];
      *to = FromFloat<Out>(p.accumulate ? ToFloat(*to) + result : result);
    }
  }
}

template <Ragged kRagged, typename In, typename Out>
void LaunchPlain(const char* name, const Problem<In, Out>& p, const Context& ctx) {
  const int64_t tiles = (p.m + kTile - 1) / kTile * ((p.n + kTile - 1) / kTile);
  Launch(name, PlainKernel<kRagged, In, Out>, tiles * (kRagged == Ragged::kSum ? p.experts : 1),
         dim3(kThreads), 0, ctx, p);
}

// Calls fn(In{}, Out{}) with the element types of inputs and output.
template <typename Fn>
void DispatchTypes(Tensor in, Tensor out, const char* op, const Fn& fn) {
  if (in.dtype() == DType::kF32 && out.dtype() == DType::kF32) return fn(float{}, float{});
  if (in.dtype() == DType::kBF16 && out.dtype() == DType::kF32) return fn(BF16{}, float{});
  if (in.dtype() == DType::kBF16 && out.dtype() == DType::kBF16) return fn(BF16{}, BF16{});
  KRAIT_FATAL(std::string(op) + " on CUDA does not take " + Name(in.dtype()) + " to " +
              Name(out.dtype()));
}

template <typename T>
Matrix<T> MatrixOf(Tensor t, bool transposed) {
  const int64_t stride = t.row_stride();
  return {t.device_data<std::remove_const_t<T>>(), transposed ? 1 : stride, transposed ? stride : 1,
          t.rank() == 3 ? t.stride(0) : 0};
}

template <typename T, typename B>
__global__ void AddBiasKernel(T* y, int64_t stride, const B* bias, int64_t rows, int64_t cols) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * cols) return;
  T* const to = y + i / cols * stride + i % cols;
  *to = FromFloat<T>(ToFloat(*to) + ToFloat(bias[i % cols]));
}

// A block sums 32 columns: thread (x, y) the rows y, y + 32, ..., then thread (x, 0) the 32 sums.
template <typename T>
__global__ void ColumnSumKernel(float* sum, const T* x, int64_t stride, int64_t rows,
                                int64_t cols) {
  __shared__ float shared[32][33];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float part = 0.0f;
  if (col < cols) {
    for (int64_t row = threadIdx.y; row < rows; row += 32) part += ToFloat(x[row * stride + col]);
  }
  shared[threadIdx.y][threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.y > 0 || col >= cols) return;
  for (int y = 1; y < 32; ++y) part += shared[y][threadIdx.x];
  sum[col] += part;
}

}  // namespace

void PlainMatMul(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b, Tensor bias,
                 bool accumulate, const Context& ctx) {
  DispatchTypes(a, c, "MatMul", [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    Problem<In, Out> p = {};
    p.a = MatrixOf<const In>(a, transpose_a), p.b = MatrixOf<const In>(b, transpose_b);
    p.c = MatrixOf<Out>(c, false);
    p.m = c.rows(), p.n = c.dim(-1), p.k = transpose_a ? a.rows() : a.dim(-1);
    p.accumulate = accumulate;
    if (bias.defined()) p.bias = bias.device_data<Out>();
    LaunchPlain<Ragged::kNone>("MatMul", p, ctx);
  });
}

void PlainGrouped(Grouped kind, Tensor out, Tensor a, Tensor b, Tensor offsets, bool accumulate,
                  const Context& ctx) {
  const bool weight = kind == Grouped::kWeight;
  DispatchTypes(a, out, "GroupedLinear", [&](auto in_zero, auto out_zero) {
    using In = decltype(in_zero);
    using Out = decltype(out_zero);
    Problem<In, Out> p = {};
    p.a = MatrixOf<const In>(a, weight);
    p.b = MatrixOf<const In>(b, kind == Grouped::kForward);
    p.c = MatrixOf<Out>(out, false);
    p.m = weight ? out.dim(1) : out.dim(0), p.n = out.dim(-1);
    p.k = weight ? 0 : a.dim(1);
    p.offsets = offsets.device_data<int64_t>();
    p.experts = static_cast<int>(offsets.numel() - 1);
    p.accumulate = accumulate;
    if (weight) {
      LaunchPlain<Ragged::kSum>("GroupedLinear", p, ctx);
    } else {
      LaunchPlain<Ragged::kRows>("GroupedLinear", p, ctx);
    }
  });
}

void AddBias(Tensor y, Tensor bias, const Context& ctx) {
  DispatchTypes(bias, y, "AddBias", [&](auto bias_zero, auto y_zero) {
    using B = decltype(bias_zero);
    using T = decltype(y_zero);
    const int64_t rows = y.rows(), cols = y.dim(-1);
    Launch("AddBias", AddBiasKernel<T, B>, (rows * cols + 255) / 256, dim3(256), 0, ctx,
           y.device_data<T>(), y.row_stride(), static_cast<const B*>(bias.device_data<B>()), rows,
           cols);
  });
}

void LinearBackwardBias(Tensor db, Tensor dy, const Context& ctx) {
  DispatchTypes(dy, db, "LinearBackwardBias", [&](auto dy_zero, auto db_zero) {
    using T = decltype(dy_zero);
    if constexpr (std::is_same_v<decltype(db_zero), float>) {
      const int64_t cols = dy.dim(-1);
      Launch("LinearBackwardBias", ColumnSumKernel<T>, (cols + 31) / 32, dim3(32, 32), 0, ctx,
             db.device_data<float>(), static_cast<const T*>(dy.device_data<T>()), dy.row_stride(),
             dy.rows(), cols);
    } else {
      KRAIT_FATAL("the gradient of a bias is f32");
    }
  });
}

}  // namespace krait::cuda
