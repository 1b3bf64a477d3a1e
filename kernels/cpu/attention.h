// Attention and rotary embedding on the CPU; see kernels/attention.h for shapes and formulas.
#ifndef KRAIT_KERNELS_CPU_ATTENTION_H_
#define KRAIT_KERNELS_CPU_ATTENTION_H_

#include <cstdint>

#include "kernels/tensor.h"

namespace krait::cpu {

// A tensor [batch, time, heads, P]; each head's P elements are contiguous.
template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride, time_stride, head_stride;
  T* At(int64_t b, int64_t t, int64_t h) const {
    return data + b * batch_stride + t * time_stride + h * head_stride;
  }
};

struct AttentionShape {
  int64_t batch, queries, keys, heads, kv_heads, head_dim;               // B, T, S, H, G, P
  const int32_t* doc_start;                                              // [B,T] or null
  int64_t first_position;                                                // of query 0
  int64_t first_key() const { return first_position + queries - keys; }  // position of key 0
};

// Scratch elements of T that each thread needs (forward: one tile of scores, backward: two).
int64_t AttentionTileElements();

// lse [B,H,T]; scratch [threads, AttentionTileElements()].
template <typename T>
void AttentionForward(const AttentionShape& shape, Heads<T> y, T* lse, Heads<T> q, Heads<T> k,
                      Heads<T> v, T* scratch);

template <typename T>
struct AttentionGradients {
  Heads<T> dq, dk, dv, dy;
};

// delta [B,H,T] is scratch, and so are `scratch` [threads, 2, AttentionTileElements()].
template <typename T>
void AttentionBackward(const AttentionShape& shape, const AttentionGradients<T>& grad, Heads<T> y,
                       const T* lse, Heads<T> q, Heads<T> k, Heads<T> v, T* delta, T* scratch);

// Rotates pairs (i, i + P/2) of x [B,T,H,P] by (first_position + t - doc_start[b,t]) *
// frequency[i].
template <typename T>
void Rope(const AttentionShape& shape, Heads<T> x, const double* frequency, bool inverse);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_ATTENTION_H_
