// Rotary position embedding. A block has a token: its sines and cosines, in double so that angles
// of any position are exact, serve all heads.
#include <cmath>

#include "kernels/cuda/attention_tile.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void RopeKernel(AttentionShape shape, Heads<T> x, double log2_theta, double sign) {
  __shared__ float cosine[kMaxHeadDim / 2], sine[kMaxHeadDim / 2];
  StartDependent();
  const int64_t token = blockIdx.x;
  const auto b = static_cast<int>(token / shape.queries);
  const auto t = static_cast<int>(token % shape.queries);
  const int half = shape.head_dim / 2;
  const int64_t start = shape.doc_start == nullptr ? 0 : shape.doc_start[token];
  const auto position = static_cast<double>(shape.first_key + t - start);
  for (int i = threadIdx.x; i < half; i += kThreads) {
    double s, c;
    sincos(position * exp2(-2.0 * i / shape.head_dim * log2_theta), &s, &c);
    cosine[i] = static_cast<float>(c);
    sine[i] = static_cast<float>(sign * s);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < shape.heads * half; i += kThreads) {
    const int pair = i % half;
    T* const low = x.At(b, t, i / half) + pair;
    const float a = ToFloat(low[0]), d = ToFloat(low[half]);
    low[0] = FromFloat<T>(a * cosine[pair] - d * sine[pair]);
    low[half] = FromFloat<T>(d * cosine[pair] + a * sine[pair]);
  }
}

}  // namespace

void Rope(Tensor x, const Documents& documents, double theta, bool inverse, const Context& ctx) {
  const AttentionShape shape = ShapeOf(x, x, documents, {});
  const int64_t tokens = x.dim(0) * x.dim(1);
  const double log2_theta = std::log2(theta), sign = inverse ? -1 : 1;
  if (x.dtype() == DType::kF32) {
    Launch("Rope", RopeKernel<float>, Dependent(tokens), dim3(kThreads), 0, ctx, shape,
           HeadsOf<float>(x), log2_theta, sign);
  } else {
    Launch("Rope", RopeKernel<BF16>, Dependent(tokens), dim3(kThreads), 0, ctx, shape,
           HeadsOf<BF16>(x), log2_theta, sign);
  }
}

}  // namespace krait::cuda
