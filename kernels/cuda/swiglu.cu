// SwiGLU, forward and backward, bound by memory.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/swiglu.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;
// Accesses of each operand that a thread has under way.
constexpr int kPacks = 2;

// Where a thread works: a block takes kThreads * kPacks accesses of one row.
struct Place {
  int64_t row;
  int column;
  __device__ Place(int vec, int blocks_per_row) {
    row = blockIdx.x / blocks_per_row;
    column = (blockIdx.x % blocks_per_row * kThreads * kPacks + threadIdx.x) * vec;
  }
};
template <int kVec>
int64_t BlocksPerRow(int64_t columns) {
  return (columns + kThreads * kPacks * kVec - 1) / (kThreads * kPacks * kVec);
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(Rows<T> product, Rows<const T> gate_up, int f, int blocks_per_row) {
  StartDependent();
  const Place place(kVec, blocks_per_row);
  const T* const in = gate_up[place.row];
  Pack<T, kVec> gate[kPacks], up[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = place.column + p * kThreads * kVec;
    if (column >= f) continue;
    gate[p] = Load<kVec>(in + column);
    up[p] = Load<kVec>(in + f + column);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = place.column + p * kThreads * kVec;
    if (column >= f) continue;
    const Pack<float, kVec> g = Widen(gate[p]);
    Pack<float, kVec> out = Widen(up[p]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) out.v[j] *= g.v[j] * Sigmoid(g.v[j]);
    Store(product[place.row] + column, Round<T>(out));
  }
}

// One access: gradients of gate and up and the product, times `p`; returns product . d, without p.
template <typename T, int kVec>
__device__ inline float Gradient(Pack<T, kVec>* gate, Pack<T, kVec>* up, Pack<T, kVec>* product,
                                 const Pack<T, kVec>& d_product, float p) {
  float dot = 0.0f;
  Pack<float, kVec> g = Widen(*gate), u = Widen(*up), d = Widen(d_product);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const float s = Sigmoid(g.v[j]), silu = g.v[j] * s, value = silu * u.v[j];
    dot += value * d.v[j];
    g.v[j] = p * (d.v[j] * u.v[j] * (s + silu * (1.0f - s)));
    u.v[j] = p * (d.v[j] * silu);
    d.v[j] = p * value;
  }
  *gate = Round<T>(g);
  *up = Round<T>(u);
  *product = Round<T>(d);
  return dot;
}

// All loads of a thread come before its stores: d_gate_up may be the memory of gate_up.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(Rows<T> d_gate_up, Rows<T> product, Rows<const T> d_product,
                   Rows<const T> gate_up, int f, int blocks_per_row) {
  StartDependent();
  const Place place(kVec, blocks_per_row);
  const T* const in = gate_up[place.row];
  Pack<T, kVec> gate[kPacks], up[kPacks], d[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = place.column + p * kThreads * kVec;
    if (column >= f) continue;
    gate[p] = Load<kVec>(in + column);
    up[p] = Load<kVec>(in + f + column);
    d[p] = Load<kVec>(d_product[place.row] + column);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = place.column + p * kThreads * kVec;
    if (column >= f) continue;
    Pack<T, kVec> value;
    Gradient(&gate[p], &up[p], &value, d[p], 1.0f);
    Store(d_gate_up[place.row] + column, gate[p]);
    Store(d_gate_up[place.row] + f + column, up[p]);
    if (product.data != nullptr) Store(product[place.row] + column, value);
  }
}

// One block for each row.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    WeightedBackwardKernel(Rows<T> d_gate_up, Rows<T> product, const float* weight, float* d_weight,
                           const int32_t* source, Rows<const T> d_product, Rows<const T> gate_up,
                           int f) {
  __shared__ float shared[kThreads / 32];
  StartDependent();
  const int64_t row = blockIdx.x;
  const int choice = source[row];
  const float p = choice < 0 ? 0.0f : weight[choice];
  float dot = 0.0f;
#pragma unroll 2
  for (int column = threadIdx.x * kVec; column < f; column += kThreads * kVec) {
    Pack<T, kVec> gate = {}, up = {}, value = {};
    if (choice >= 0) {
      gate = Load<kVec>(gate_up[row] + column);
      up = Load<kVec>(gate_up[row] + f + column);
      dot += Gradient(&gate, &up, &value, Load<kVec>(d_product[row] + column), p);
    }
    Store(d_gate_up[row] + column, gate);
    Store(d_gate_up[row] + f + column, up);
    Store(product[row] + column, value);
  }
  if (choice < 0) return;  // all threads of the block
  dot = GroupSum(dot, shared);
  if (threadIdx.x == 0) d_weight[choice] = dot;
}

// `narrow` tensors are [M,F], `wide` ones [M,2F]; undefined ones are left out.
struct Shape {
  int64_t rows, f;
  bool vectorizable = true;
  Shape(std::initializer_list<Tensor> narrow, std::initializer_list<Tensor> wide)
      : rows(wide.begin()->rows()), f(wide.begin()->dim(-1) / 2) {
    const DType dtype = wide.begin()->dtype();
    const auto check = [&](const Tensor& t, int64_t columns) {
      if (!t.defined()) return;
      KRAIT_CHECK(t.dtype() == dtype && t.rows() == rows && t.dim(-1) == columns);
      vectorizable = vectorizable && Vectorizable(t);
    };
    for (const Tensor& t : narrow) check(t, f);
    for (const Tensor& t : wide) check(t, 2 * f);
    KRAIT_CHECK(dtype == DType::kF32 || dtype == DType::kBF16);
    KRAIT_CHECK(2 * f <= INT32_MAX);
    // The second half of a row must be aligned as well.
    vectorizable = vectorizable && f % (16 / SizeOf(dtype)) == 0;
  }
};

// Calls run(T{}, vec), vec as std::integral_constant.
template <typename Run>
void Dispatch(const Tensor& gate_up, const Shape& shape, const Run& run) {
  if (shape.rows == 0 || shape.f == 0) return;
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    shape.vectorizable ? run(zero, std::integral_constant<int, kVectorOf<T>>())
                       : run(zero, std::integral_constant<int, 1>());
  };
  gate_up.dtype() == DType::kBF16 ? with_type(BF16()) : with_type(0.0f);
}

template <typename T>
Rows<T> RowsOrNull(const Tensor& t) {
  return t.defined() ? RowsOf<T>(t) : Rows<T>{nullptr, 0};
}

}  // namespace

void SwiGluForward(Tensor product, Tensor gate_up, const Context& ctx) {
  const Shape shape({product}, {gate_up});
  Dispatch(gate_up, shape, [&](auto zero, auto vec) {
    using T = decltype(zero);
    const int64_t per_row = BlocksPerRow<vec>(shape.f);
    Launch("SwiGluForward", ForwardKernel<T, vec>, Dependent(shape.rows * per_row), dim3(kThreads),
           0, ctx, RowsOf<T>(product), RowsOf<const T>(gate_up), static_cast<int>(shape.f),
           static_cast<int>(per_row));
  });
}

void SwiGluBackward(Tensor d_gate_up, Tensor product, Tensor d_product, Tensor gate_up,
                    const Context& ctx) {
  const Shape shape({product, d_product}, {gate_up, d_gate_up});
  Dispatch(gate_up, shape, [&](auto zero, auto vec) {
    using T = decltype(zero);
    const int64_t per_row = BlocksPerRow<vec>(shape.f);
    Launch("SwiGluBackward", BackwardKernel<T, vec>, Dependent(shape.rows * per_row),
           dim3(kThreads), 0, ctx, RowsOf<T>(d_gate_up), RowsOrNull<T>(product),
           RowsOf<const T>(d_product), RowsOf<const T>(gate_up), static_cast<int>(shape.f),
           static_cast<int>(per_row));
  });
}

void WeightedSwiGluBackward(Tensor d_gate_up, Tensor product, const RowWeights& rows,
                            Tensor d_product, Tensor gate_up, const Context& ctx) {
  const Shape shape({product, d_product}, {gate_up, d_gate_up});
  KRAIT_CHECK(rows.source.numel() >= shape.rows && rows.source.contiguous());
  KRAIT_CHECK(rows.weight.contiguous() && rows.d_weight.contiguous() &&
              rows.weight.numel() == rows.d_weight.numel());
  Dispatch(gate_up, shape, [&](auto zero, auto vec) {
    using T = decltype(zero);
    Launch("WeightedSwiGluBackward", WeightedBackwardKernel<T, vec>, Dependent(shape.rows),
           dim3(kThreads), 0, ctx, RowsOf<T>(d_gate_up), RowsOf<T>(product),
           static_cast<const float*>(rows.weight.device_data<float>()),
           rows.d_weight.device_data<float>(),
           static_cast<const int32_t*>(rows.source.device_data<int32_t>()),
           RowsOf<const T>(d_product), RowsOf<const T>(gate_up), static_cast<int>(shape.f));
  });
}

}  // namespace krait::cuda
