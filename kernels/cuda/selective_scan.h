// kernels/selective_scan.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone.
// Plain C++.
#ifndef KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_H_
#define KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/selective_scan.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// Time steps between the states that the forward keeps.
inline constexpr int64_t kScanSteps = 16;
inline int64_t ScanStates(int64_t t) { return (t + kScanSteps - 1) / kScanSteps; }

// Multiprocessors of an H100 or H200, and blocks of 64 channels below which smaller blocks are
// used.
inline constexpr int64_t kMultiprocessors = 132, kFewBlocks = 96;

// Channels of one block of the backward. A warp has 8; blocks of fewer warps where there are few
// channels, so that every multiprocessor has one, and where the states of a channel are many.
inline int64_t ScanBackwardChannels(DType dtype, int64_t batch, int64_t channels, int64_t states) {
  const bool wide =
      dtype == DType::kBF16 && states <= 16 && batch * ((channels + 63) / 64) >= kFewBlocks;
  return wide ? 64 : 32;
}

// Floats of scratch that the backward takes: partial sums of db and dc, one of each per block of
// channels, and of the gradients of the parameters, one per sequence.
inline int64_t ScanBackwardScratch(DType dtype, int64_t batch, int64_t time, int64_t channels,
                                   int64_t states) {
  const int64_t width = ScanBackwardChannels(dtype, batch, channels, states);
  const int64_t blocks = (channels + width - 1) / width;
  const int64_t groups = states <= 16 ? 1 : 4;
  return blocks * batch * ScanStates(time) * kScanSteps * 32 * groups +
         batch * channels * (states + 2);
}

// kept_states as kernels/selective_scan.h has it, [B, ScanStates(T), I, N] in this order.
void SelectiveScanForward(Tensor y, Tensor final_state, Tensor kept_states,
                          const SelectiveScanInputs& in, const Context& ctx);

// `scratch`: f32, of ScanBackwardScratch elements.
void SelectiveScanBackward(const SelectiveScanGradients& grad, Tensor y, Tensor dy,
                           Tensor d_final_state, Tensor kept_states, const SelectiveScanInputs& in,
                           Tensor scratch, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_H_
