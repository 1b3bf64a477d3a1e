#include "kernels/cpu/gemm.h"

#include <algorithm>

#include "kernels/base/check.h"
#include "kernels/base/parallel_for.h"
#include "kernels/cpu/blas.h"
#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

const Blas& Loaded() {
  static const Blas blas = [] {
    const absl::StatusOr<Blas> loaded = LoadBlas();
    if (!loaded.ok())
      Fatal(ExitCodeOf(loaded.status()), __FILE__, __LINE__, MessageOf(loaded.status()));
    return *loaded;
  }();
  return blas;
}

CBLAS_TRANSPOSE Op(bool transposed) { return transposed ? CblasTrans : CblasNoTrans; }

void Product(int m, int n, int k, float scale, Matrix<float> a, Matrix<float> b, float beta,
             float* c, int c_stride) {
  Loaded().sgemm(CblasRowMajor, Op(a.transposed), Op(b.transposed), m, n, k, scale, a.data,
                 static_cast<int>(a.stride), b.data, static_cast<int>(b.stride), beta, c, c_stride);
}

void Product(int m, int n, int k, double scale, Matrix<double> a, Matrix<double> b, double beta,
             double* c, int c_stride) {
  Loaded().dgemm(CblasRowMajor, Op(a.transposed), Op(b.transposed), m, n, k, scale, a.data,
                 static_cast<int>(a.stride), b.data, static_cast<int>(b.stride), beta, c, c_stride);
}

template <typename T>
Matrix<T> At(Matrix<T> matrix, int64_t row, int64_t column) {
  matrix.data += matrix.transposed ? column * matrix.stride + row : row * matrix.stride + column;
  return matrix;
}

// Rows added before the partial sum joins the total: two levels keep the rounding error of long
// columns small.
constexpr int64_t kSumBlock = 128;
constexpr int64_t kSumColumns = 256;

template <typename T>
KRAIT_INLINE void SumColumnsLoop(int64_t m, int64_t n, const T* x, int64_t x_stride, T* sum) {
  for (int64_t begin = 0; begin < m; begin += kSumBlock) {
    const int64_t end = std::min(m, begin + kSumBlock);
    T partial[kSumColumns] = {};
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < n; ++j) partial[j] += x[i * x_stride + j];
    }
    for (int64_t j = 0; j < n; ++j) sum[j] += partial[j];
  }
}

KRAIT_CLONES void SumColumns(int64_t m, int64_t n, const float* x, int64_t x_stride, float* sum) {
  SumColumnsLoop(m, n, x, x_stride, sum);
}
void SumColumns(int64_t m, int64_t n, const double* x, int64_t x_stride, double* sum) {
  SumColumnsLoop(m, n, x, x_stride, sum);
}

}  // namespace

template <typename T>
void Gemm(int64_t m, int64_t n, int64_t k, T scale, Matrix<T> a, Matrix<T> b, bool accumulate, T* c,
          int64_t c_stride, int64_t max_extent) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (accumulate) return;
    for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_stride, n, T{0});
    return;
  }
  KRAIT_CHECK(std::max({a.stride, b.stride, c_stride}) <= kMaxBlasExtent);
  for (int64_t i = 0; i < m; i += max_extent) {
    for (int64_t j = 0; j < n; j += max_extent) {
      for (int64_t l = 0; l < k; l += max_extent) {
        Product(static_cast<int>(std::min(max_extent, m - i)),
                static_cast<int>(std::min(max_extent, n - j)),
                static_cast<int>(std::min(max_extent, k - l)), scale, At(a, i, l), At(b, l, j),
                accumulate || l > 0 ? T{1} : T{0}, c + i * c_stride + j,
                static_cast<int>(c_stride));
      }
    }
  }
}

template <typename T>
void BroadcastRow(int64_t m, int64_t n, const T* bias, T* y, int64_t y_stride) {
  ParallelFor(m, 64, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::copy_n(bias, n, y + i * y_stride);
  });
}

template <typename T>
void AddRow(int64_t m, int64_t n, const T* bias, T* y, int64_t y_stride) {
  ParallelFor(m, 64, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < n; ++j) y[i * y_stride + j] += bias[j];
    }
  });
}

template <typename T>
void SumRows(int64_t m, int64_t n, const T* x, int64_t x_stride, T* sum) {
  ParallelFor(n, kSumColumns, [=](int64_t begin, int64_t end) {
    SumColumns(m, end - begin, x + begin, x_stride, sum + begin);
  });
}

template void Gemm(int64_t, int64_t, int64_t, float, Matrix<float>, Matrix<float>, bool, float*,
                   int64_t, int64_t);
template void Gemm(int64_t, int64_t, int64_t, double, Matrix<double>, Matrix<double>, bool, double*,
                   int64_t, int64_t);
template void BroadcastRow(int64_t, int64_t, const float*, float*, int64_t);
template void BroadcastRow(int64_t, int64_t, const double*, double*, int64_t);
template void AddRow(int64_t, int64_t, const float*, float*, int64_t);
template void AddRow(int64_t, int64_t, const double*, double*, int64_t);
template void SumRows(int64_t, int64_t, const float*, int64_t, float*);
template void SumRows(int64_t, int64_t, const double*, int64_t, double*);

}  // namespace krait::cpu
