// The loops of the selective scan: one block of channels over one chunk of time, forward and
// backward; see kernels/selective_scan.h for the formulas.
//
// Channels are the vector lanes: arrays of the recurrence are [state][kScanBlock], padded with
// zeros where a block has fewer channels, so that every inner loop has one fixed length. Time runs
// sequentially, document starts are a branch that all lanes take together.
//
// Learned: the states and decays of a chunk are kept for the way back (0.5 MB at N 16: level-2
// cache), which costs less than a second exponential. Blocks of 32 channels are a third slower in
// the backward, because each sum over lanes (db, dc) then serves half as many elements. Prefetching
// the rows of a later step, also those to be written, is worth 20 %.
#ifndef KRAIT_KERNELS_CPU_SELECTIVE_SCAN_H_
#define KRAIT_KERNELS_CPU_SELECTIVE_SCAN_H_

#include <cstdint>

#include "kernels/selective_scan.h"

namespace krait::cpu {

inline constexpr int64_t kScanBlock = 64;
// Time steps between the states that the forward keeps for the backward.
inline constexpr int64_t kScanChunk = 64;

// A row-strided array: row t begins at data + t * stride.
template <typename T>
struct TimeRows {
  T* data = nullptr;
  int64_t stride = 0;
  T* operator[](int64_t t) const { return data + t * stride; }
};

// The inputs of a chunk: pointers to its first step and the block's first channel.
template <typename T>
struct ScanChunk {
  int64_t steps, width, states;  // width: channels in use, 1..kScanBlock
  TimeRows<const T> x, dt_raw, z, b, c;
  const int32_t* doc_start;  // [steps], or null for none
  int64_t first;             // position of the first step
  bool Reset(int64_t t) const {
    return doc_start != nullptr && doc_start[t] == first + t;
  }
  // Parameters, padded to kScanBlock: a2 = A * log2(e) [states][kScanBlock]; d, dt_bias.
  const T *a2, *d, *dt_bias;
};

// Advances h [states][kScanBlock] over the chunk and writes y.
void ScanForwardChunk(const ScanChunk<float>& in, float* h, TimeRows<float> y);
void ScanForwardChunk(const ScanChunk<double>& in, double* h, TimeRows<double> y);

// Working memory of a backward chunk, in elements of T.
constexpr int64_t ScanBackwardWorkspace(int64_t states) {
  return kScanBlock * (2 * kScanChunk * states + 2 * states + 4 * kScanChunk);
}

template <typename T>
struct ScanChunkGradients {
  TimeRows<const T> dy;
  TimeRows<T> y;  // recomputed output; data may be null
  TimeRows<T> dx, d_dt_raw, dz;
  // Sums over the block's channels, [steps][states], overwritten.
  T *db, *dc;
  // [states][kScanBlock]: carry comes in as the gradient of the state after the chunk and leaves
  // as that of the state before it; da (the gradient of A) is added to.
  T *carry, *da;
  T *dd, *d_dt_bias;  // [kScanBlock], added to
};

// `workspace` begins with the state before the chunk, [states][kScanBlock].
void ScanBackwardChunk(const ScanChunk<float>& in, const ScanChunkGradients<float>& grad,
                       float* workspace);
void ScanBackwardChunk(const ScanChunk<double>& in, const ScanChunkGradients<double>& grad,
                       double* workspace);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_SELECTIVE_SCAN_H_
