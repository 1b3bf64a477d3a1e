// The second half of every gradient of a weight vector: partial sums of blocks, added in order.
#ifndef KRAIT_KERNELS_CUDA_COLUMN_SUMS_CUH_
#define KRAIT_KERNELS_CUDA_COLUMN_SUMS_CUH_

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {

// Columns of a block, and strided sums of each.
inline constexpr int kSumColumns = 32, kSumStrides = 16;

// sums[col] += the sum of partial[p][col] over p < partials.
template <typename Place>
__global__ void ColumnSumsKernel(Place place, Rows<const float> partial, int partials,
                                 int64_t cols) {
  __shared__ float shared[kSumStrides][kSumColumns];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  StartDependent();
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 4
    for (int p = threadIdx.y; p < partials; p += kSumStrides) sum += partial[p][col];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= cols) return;
  for (int y = 1; y < kSumStrides; ++y) sum += shared[y][threadIdx.x];
  *place(col) += sum;
}

// *place(col) += the sum of column `col` of the first `partials` rows of partial [.., cols] f32, in
// a fixed order; place is a copyable device function to float*.
template <typename Place>
void AddColumnSums(const char* name, Place place, Tensor partial, int64_t partials,
                   const Context& ctx) {
  const int64_t cols = partial.dim(-1);
  Launch(name, ColumnSumsKernel<Place>, Dependent((cols + kSumColumns - 1) / kSumColumns),
         dim3(kSumColumns, kSumStrides), 0, ctx, place, RowsOf<const float>(partial),
         static_cast<int>(partials), cols);
}

// A vector of one element per column.
struct VectorPlace {
  float* data;
  __device__ float* operator()(int64_t col) const { return data + col; }
};

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_COLUMN_SUMS_CUH_
