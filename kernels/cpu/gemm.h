// Matrix products on the CPU: the one user of CBLAS.
#ifndef KRAIT_KERNELS_CPU_GEMM_H_
#define KRAIT_KERNELS_CPU_GEMM_H_

#include <cstdint>
#include <limits>

namespace krait::cpu {

// CBLAS takes 32-bit sizes; products with a larger extent are cut.
inline constexpr int64_t kMaxBlasExtent = std::numeric_limits<int32_t>::max();

// A row-major matrix operand: element (i,j) at data[i * stride + j], or at data[j * stride + i]
// when `transposed`.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
  bool transposed;
};

// c[M,N] (rows `c_stride` apart) = scale * a[M,K] * b[K,N] (+ c when `accumulate`); T is float or
// double. K = 0 gives zeros. Runs on one thread when called from a parallel region, else on all.
// Products with an extent above `max_extent` are cut into several calls.
template <typename T>
void Gemm(int64_t m, int64_t n, int64_t k, T scale, Matrix<T> a, Matrix<T> b, bool accumulate, T* c,
          int64_t c_stride, int64_t max_extent = kMaxBlasExtent);

// y[M,N] rows = bias.
template <typename T>
void BroadcastRow(int64_t m, int64_t n, const T* bias, T* y, int64_t y_stride);

// y[M,N] rows += bias.
template <typename T>
void AddRow(int64_t m, int64_t n, const T* bias, T* y, int64_t y_stride);

// sum[N] += sum over the rows of x[M,N].
template <typename T>
void SumRows(int64_t m, int64_t n, const T* x, int64_t x_stride, T* sum);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_GEMM_H_
