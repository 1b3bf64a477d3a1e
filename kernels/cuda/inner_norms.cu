// The three norms over the columns dt | B | C of x_proj's output: a warp takes a row, lane l the
// columns l + 32 i, and keeps their weights and sums of dw in registers. The next row is loaded
// before the sums over the current one, whose latency is what such short rows are bound by.
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/inner_norms.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kWarps = 8;

// A vector over the columns, in three parts.
template <typename T>
struct Parts {
  T *dt, *b, *c;
  int end_dt, end_b, end_c;  // R, R+N, R+2N
  __device__ int PartOf(int col) const { return (col >= end_dt) + (col >= end_b); }
  __device__ T* operator()(int64_t col) const {
    return col < end_dt ? dt + col : (col < end_b ? b + (col - end_dt) : c + (col - end_b));
  }
};
template <typename T>
Parts<T> PartsOf(const InnerNormWeights& w, int64_t columns) {
  for (const Tensor& t : {w.dt, w.b, w.c}) KRAIT_CHECK(t.defined() && t.contiguous());
  KRAIT_CHECK(w.b.numel() == w.c.numel() && w.dt.numel() + 2 * w.b.numel() == columns);
  const int r = static_cast<int>(w.dt.numel()), n = static_cast<int>(w.b.numel());
  return {w.dt.device_data<float>(),
          w.b.device_data<float>(),
          w.c.device_data<float>(),
          r,
          r + n,
          r + 2 * n};
}

// This lane's columns of a row; zeros beyond the last row and column.
template <int kItems>
__device__ inline void LoadRow(float (&values)[kItems], const Rows<const float>& from, int64_t row,
                               int64_t rows, int columns) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = threadIdx.x + 32 * i;
    values[i] = row < rows && col < columns ? from[row][col] : 0.0f;
  }
}

// Adds value to the sum of the part.
__device__ inline void AddToPart(float (&sums)[3], int part, float value) {
#pragma unroll
  for (int p = 0; p < 3; ++p) sums[p] += part == p ? value : 0.0f;
}
__device__ inline float OfPart(const float (&values)[3], int part) {
  return part == 0 ? values[0] : (part == 1 ? values[1] : values[2]);
}

template <typename T, int kItems>
__global__ void __launch_bounds__(32 * kWarps)
    ForwardKernel(Rows<T> normed, float* rstd, Rows<const float> projected, Parts<const float> w,
                  int64_t rows, float eps) {
  StartDependent();
  const int columns = w.end_c;
  float weight[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = threadIdx.x + 32 * i;
    weight[i] = col < columns ? *w(col) : 0.0f;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  float x[kItems], next[kItems];
  LoadRow(next, projected, row, rows, columns);
  for (; row < rows; row += step) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) x[i] = next[i];
    LoadRow(next, projected, row + step, rows, columns);
    float squares[3] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      AddToPart(squares, w.PartOf(threadIdx.x + 32 * i), x[i] * x[i]);
    const float sizes[3] = {static_cast<float>(w.end_dt), static_cast<float>(w.end_b - w.end_dt),
                            static_cast<float>(w.end_b - w.end_dt)};
    float scale[3];
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      const float sum = WarpSum(squares[p]);
      const float nan = __int_as_float(0x7fffffff);
      scale[p] = isfinite(sum) ? 1.0f / sqrtf(sum / sizes[p] + eps) : nan;
      if (threadIdx.x == 0) rstd[p * rows + row] = scale[p];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = threadIdx.x + 32 * i;
      if (col >= columns) continue;
      normed[row][col] = FromFloat<T>(x[i] * OfPart(scale, w.PartOf(col)) * weight[i]);
    }
  }
}

// Block b writes its rows' sum of dy * xhat to partial[b].
template <typename T, int kItems>
__global__ void __launch_bounds__(32 * kWarps, kItems <= 9 ? 2 : 1)
    BackwardKernel(Rows<T> d_projected, Rows<float> partial, Rows<const float> d_normed,
                   Rows<const float> projected, const float* rstd, Parts<const float> w,
                   int64_t rows) {
  __shared__ float shared[kWarps][32 * kItems];
  StartDependent();
  const int columns = w.end_c;
  float weight[kItems], dw[kItems] = {};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = threadIdx.x + 32 * i;
    weight[i] = col < columns ? *w(col) : 0.0f;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  float xhat[kItems], dy[kItems], scale[3], next_x[kItems], next_dy[kItems], next_scale[3];
  const auto load_next = [&](int64_t next) {
    LoadRow(next_x, projected, next, rows, columns);
    LoadRow(next_dy, d_normed, next, rows, columns);
#pragma unroll
    for (int p = 0; p < 3; ++p) next_scale[p] = next < rows ? rstd[p * rows + next] : 0.0f;
  };
  load_next(row);
  for (; row < rows; row += step) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) xhat[i] = next_x[i], dy[i] = next_dy[i];
#pragma unroll
    for (int p = 0; p < 3; ++p) scale[p] = next_scale[p];
    load_next(row + step);
    float dots[3] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int part = w.PartOf(threadIdx.x + 32 * i);
      xhat[i] *= OfPart(scale, part);
      dw[i] += dy[i] * xhat[i];
      AddToPart(dots, part, dy[i] * xhat[i] * weight[i]);
    }
    const float sizes[3] = {static_cast<float>(w.end_dt), static_cast<float>(w.end_b - w.end_dt),
                            static_cast<float>(w.end_b - w.end_dt)};
#pragma unroll
    for (int p = 0; p < 3; ++p) dots[p] = WarpSum(dots[p]) / sizes[p];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = threadIdx.x + 32 * i, part = w.PartOf(col);
      if (col >= columns) continue;
      d_projected[row][col] =
          FromFloat<T>(OfPart(scale, part) * (dy[i] * weight[i] - xhat[i] * OfPart(dots, part)));
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) shared[threadIdx.y][threadIdx.x + 32 * i] = dw[i];
  __syncthreads();
  for (int col = threadIdx.y * 32 + threadIdx.x; col < columns; col += 32 * kWarps) {
    float sum = shared[0][col];
    for (int warp = 1; warp < kWarps; ++warp) sum += shared[warp][col];
    partial[blockIdx.x][col] = sum;
  }
}

// Calls run(T{}, items), items as std::integral_constant.
template <typename Run>
void Dispatch(const Tensor& out, const Run& run) {
  const int64_t columns = out.dim(-1);
  const auto with_type = [&](auto zero) {
    if (columns <= 5 * 32) {
      run(zero, std::integral_constant<int, 5>());
    } else if (columns <= 9 * 32) {
      run(zero, std::integral_constant<int, 9>());
    } else if (columns <= 18 * 32) {
      run(zero, std::integral_constant<int, 18>());
    } else if (columns <= 40 * 32) {
      run(zero, std::integral_constant<int, 40>());
    } else {
      KRAIT_FATAL("InnerNorms on CUDA takes at most 1280 columns, not " + std::to_string(columns));
    }
  };
  KRAIT_CHECK(out.dtype() == DType::kF32 || out.dtype() == DType::kBF16);
  out.dtype() == DType::kBF16 ? with_type(BF16()) : with_type(0.0f);
}

void CheckShapes(const Tensor& out, const Tensor& rstd, const Tensor& projected) {
  KRAIT_CHECK(out.rows() == projected.rows() && out.dim(-1) == projected.dim(-1));
  KRAIT_CHECK(rstd.numel() == 3 * projected.rows() && rstd.contiguous());
}

}  // namespace

void InnerNormsForward(Tensor normed, Tensor rstd, Tensor projected, const InnerNormWeights& w,
                       double eps, const Context& ctx) {
  if (projected.numel() == 0) return;
  CheckShapes(normed, rstd, projected);
  const int64_t rows = projected.rows();
  Dispatch(normed, [&](auto zero, auto items) {
    using T = decltype(zero);
    Launch("InnerNormsForward", ForwardKernel<T, items>,
           Dependent(std::min((rows + kWarps - 1) / kWarps, 2 * kInnerNormBlocks)),
           dim3(32, kWarps), 0, ctx, RowsOf<T>(normed), rstd.device_data<float>(),
           RowsOf<const float>(projected), PartsOf<const float>(w, projected.dim(-1)), rows,
           static_cast<float>(eps));
  });
}

void InnerNormsBackward(Tensor d_projected, const InnerNormWeights& dw, Tensor d_normed,
                        Tensor projected, Tensor rstd, const InnerNormWeights& w, Tensor partial,
                        const Context& ctx) {
  if (projected.numel() == 0) return;
  CheckShapes(d_projected, rstd, projected);
  CheckShapes(d_normed, rstd, projected);
  const int64_t rows = projected.rows();
  const int64_t blocks = std::min((rows + kWarps - 1) / kWarps, kInnerNormBlocks);
  KRAIT_CHECK(partial.dim(0) >= blocks && partial.dim(1) == projected.dim(-1));
  Dispatch(d_projected, [&](auto zero, auto items) {
    using T = decltype(zero);
    Launch("InnerNormsBackward", BackwardKernel<T, items>, Dependent(blocks), dim3(32, kWarps), 0,
           ctx, RowsOf<T>(d_projected), RowsOf<float>(partial), RowsOf<const float>(d_normed),
           RowsOf<const float>(projected), static_cast<const float*>(rstd.device_data<float>()),
           PartsOf<const float>(w, projected.dim(-1)), rows);
  });
  AddColumnSums("InnerNormsBackward column sums", PartsOf<float>(dw, projected.dim(-1)), partial,
                blocks, ctx);
}

}  // namespace krait::cuda
