#include "kernels/cuda/bucket_sort.h"
#include "kernels/cuda/launch.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = kBucketKeys, kWarps = kThreads / 32;

// place[i] = how many elements of the same block and key come before i; counts[block][bucket].
__global__ void __launch_bounds__(kThreads)
    RankKernel(int32_t* place, int32_t* counts, BucketKeys keys, int64_t n, int buckets) {
  extern __shared__ int32_t of_warp[];  // [kWarps][buckets]
  for (int i = threadIdx.x; i < kWarps * buckets; i += kThreads) of_warp[i] = 0;
  __syncthreads();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int key = i < n ? (keys.keys[i] >> keys.shift) & keys.mask : -1;
  const unsigned same = __match_any_sync(~0u, key);
  const int before = __popc(same & ((1u << lane) - 1));
  if (key >= 0 && before == 0) of_warp[warp * buckets + key] = __popc(same);
  __syncthreads();
  // The counts of the warps before, and the block's.
  for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int count = of_warp[w * buckets + bucket];
      of_warp[w * buckets + bucket] = sum;
      sum += count;
    }
    counts[static_cast<int64_t>(blockIdx.x) * buckets + bucket] = sum;
  }
  __syncthreads();
  if (key >= 0) place[i] = of_warp[warp * buckets + key] + before;
}

// One block: counts[block][bucket] becomes the number of elements of the bucket in earlier blocks,
// offsets the starts of the buckets.
__global__ void __launch_bounds__(kMaxBuckets)
    OffsetsKernel(int64_t* offsets, int32_t* counts, int64_t blocks, int buckets,
                  int64_t alignment) {
  __shared__ int64_t end[kMaxBuckets];
  const int bucket = threadIdx.x;
  int32_t sum = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    int32_t* const at = counts + block * buckets + bucket;
    const int32_t count = *at;
    *at = sum;
    sum += count;
  }
  end[bucket] = (sum + alignment - 1) / alignment * alignment;
  __syncthreads();
  for (int step = 1; step < buckets; step *= 2) {
    const int64_t before = bucket >= step ? end[bucket - step] : 0;
    __syncthreads();
    end[bucket] += before;
    __syncthreads();
  }
  if (bucket == 0) offsets[0] = 0;
  offsets[bucket + 1] = end[bucket];
}

__global__ void __launch_bounds__(kThreads)
    PlaceKernel(int32_t* place, const int64_t* offsets, const int32_t* counts, BucketKeys keys,
                int64_t n, int buckets) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int key = (keys.keys[i] >> keys.shift) & keys.mask;
  place[i] +=
      static_cast<int32_t>(offsets[key]) + counts[static_cast<int64_t>(blockIdx.x) * buckets + key];
}

}  // namespace

void SortIntoBuckets(int32_t* place, int64_t* offsets, int32_t* counts, BucketKeys keys, int64_t n,
                     int64_t buckets, int64_t alignment, const Context& ctx) {
  KRAIT_CHECK(buckets >= 1 && buckets <= kMaxBuckets && n <= INT32_MAX);
  const int64_t blocks = BucketBlocks(n);
  const int count = static_cast<int>(buckets);
  Launch("sort: ranks", RankKernel, blocks, dim3(kThreads),
         kWarps * buckets * static_cast<int64_t>(sizeof(int32_t)), ctx, place, counts, keys, n,
         count);
  Launch("sort: offsets", OffsetsKernel, 1, dim3(static_cast<unsigned>(count)), 0, ctx, offsets,
         counts, blocks, count, alignment);
  Launch("sort: places", PlaceKernel, blocks, dim3(kThreads), 0, ctx, place,
         static_cast<const int64_t*>(offsets), static_cast<const int32_t*>(counts), keys, n, count);
}

}  // namespace krait::cuda
