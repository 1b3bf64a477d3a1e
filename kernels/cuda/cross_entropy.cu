// Softmax cross-entropy over rows of logits: one block a row, each pass bound by memory.
#include <cmath>

#include "kernels/cuda/cross_entropy.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Combines the values of all threads, the same result in each; `shared` holds kWarps values.
template <typename V, typename Combine>
__device__ inline V BlockReduce(V value, V* shared, const Combine& combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(~0u, value, lanes));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared[warp]);
  return value;
}

// Calls take(column, values) for this thread's accesses of the first `used` columns; values beyond
// them are -infinity.
template <typename T, int kVec, typename Take>
__device__ inline void ForEachAccess(const T* row, int64_t used, const Take& take) {
#pragma unroll 4
  for (int64_t col = threadIdx.x * kVec; col < used; col += kThreads * kVec) {
    Pack<float, kVec> values = Widen(Load<kVec>(row + col));
    if (col + kVec > used) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) values.v[j] = col + j < used ? values.v[j] : -INFINITY;
    }
    take(col, values);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    MaxKernel(float* max, Rows<const T> logits, VocabularySlice slice) {
  __shared__ float shared[kWarps];
  float most = -INFINITY;
  ForEachAccess<T, kVec>(logits[blockIdx.x], slice.used, [&](int64_t, const auto& values) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) most = fmaxf(most, values.v[j]);
  });
  most = BlockReduce(most, shared, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x == 0) max[blockIdx.x] = most;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    SumKernel(double* sum, float* picked, const float* max, Rows<const T> logits,
              const int32_t* targets, VocabularySlice slice) {
  __shared__ double shared[kWarps];
  const int64_t row = blockIdx.x;
  const int32_t target = targets[row];
  const float most = max[row];
  // A thread's sum is of few terms; the threads' are added in double.
  float own = 0.0f;
  if (target >= 0) {
    ForEachAccess<T, kVec>(logits[row], slice.used, [&](int64_t, const auto& values) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) own += expf(values.v[j] - most);
    });
  }
  const double total =
      BlockReduce(static_cast<double>(own), shared, [](double a, double b) { return a + b; });
  if (threadIdx.x > 0) return;
  sum[row] = total;
  const int64_t column = target - slice.first;
  picked[row] = column >= 0 && column < slice.used ? ToFloat(logits[row][column]) : 0.0f;
}

// All columns of d_logits, those of padding included.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    FinishKernel(float* losses, Rows<T> d_logits, const float* max, const double* sum,
                 const float* picked, Rows<const T> logits, const int32_t* targets,
                 VocabularySlice slice, const double* scale, int64_t columns) {
  const int64_t row = blockIdx.x;
  const int32_t target = targets[row];
  if (threadIdx.x == 0) {
    losses[row] =
        target < 0
            ? 0.0f
            : static_cast<float>(log(sum[row]) + static_cast<double>(max[row] - picked[row]));
  }
  if (d_logits.data == nullptr) return;
  const float step = static_cast<float>(*scale);
  const float factor = target < 0 ? 0.0f : static_cast<float>(static_cast<double>(step) / sum[row]);
  const float most = max[row];
  const int64_t picked_column = target - slice.first;
  const T* const in = logits[row];
  T* const out = d_logits[row];
#pragma unroll 4
  for (int64_t col = threadIdx.x * kVec; col < columns; col += kThreads * kVec) {
    Pack<float, kVec> values = {};
    if (target >= 0) {
      values = Widen(Load<kVec>(in + col));
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const int64_t column = col + j;
        float gradient = column < slice.used ? factor * expf(values.v[j] - most) : 0.0f;
        if (column == picked_column && column < slice.used) gradient -= step;
        values.v[j] = gradient;
      }
    }
    Store(out + col, Round<T>(values));
  }
}

// Calls run(T{}, elements of an access).
template <typename Run>
void ForRows(const Tensor& logits, const Tensor& d_logits, const Run& run) {
  const bool vectorizable = Vectorizable(logits) && (!d_logits.defined() || Vectorizable(d_logits));
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    if (vectorizable) {
      run(zero, std::integral_constant<int, kVectorOf<T>>());
    } else {
      run(zero, std::integral_constant<int, 1>());
    }
  };
  logits.dtype() == DType::kBF16 ? with(BF16()) : with(0.0f);
}

template <typename V>
V* Vector(const Tensor& t, int64_t rows) {
  KRAIT_CHECK(t.numel() == rows && t.contiguous());
  return t.device_data<std::remove_const_t<V>>();
}

}  // namespace

void CrossEntropyMax(Tensor max, Tensor logits, VocabularySlice slice, const Context& ctx) {
  const int64_t rows = logits.rows();
  KRAIT_CHECK(slice.used <= logits.dim(-1));
  ForRows(logits, Tensor(), [&](auto zero, auto vec) {
    using T = decltype(zero);
    Launch("CrossEntropyMax", MaxKernel<T, vec>, rows, dim3(kThreads), 0, ctx,
           Vector<float>(max, rows), RowsOf<const T>(logits), slice);
  });
}

void CrossEntropySum(Tensor sum, Tensor picked, Tensor max, Tensor logits, Tensor targets,
                     VocabularySlice slice, const Context& ctx) {
  const int64_t rows = logits.rows();
  ForRows(logits, Tensor(), [&](auto zero, auto vec) {
    using T = decltype(zero);
    Launch("CrossEntropySum", SumKernel<T, vec>, rows, dim3(kThreads), 0, ctx,
           Vector<double>(sum, rows), Vector<float>(picked, rows), Vector<const float>(max, rows),
           RowsOf<const T>(logits), Vector<const int32_t>(targets, rows), slice);
  });
}

void CrossEntropyFinish(Tensor losses, Tensor d_logits, Tensor max, Tensor sum, Tensor picked,
                        Tensor logits, Tensor targets, VocabularySlice slice, Tensor scale,
                        const Context& ctx) {
  const int64_t rows = logits.rows(), columns = logits.dim(-1);
  ForRows(logits, d_logits, [&](auto zero, auto vec) {
    using T = decltype(zero);
    Launch("CrossEntropyFinish", FinishKernel<T, vec>, rows, dim3(kThreads), 0, ctx,
           Vector<float>(losses, rows),
           d_logits.defined() ? RowsOf<T>(d_logits) : Rows<T>{nullptr, 0},
           Vector<const float>(max, rows), Vector<const double>(sum, rows),
           Vector<const float>(picked, rows), RowsOf<const T>(logits),
           Vector<const int32_t>(targets, rows), slice,
           d_logits.defined() ? Vector<const double>(scale, 1) : nullptr, columns);
  });
}

}  // namespace krait::cuda
