// Attention by cuDNN in a build without it: every call is the plain kernels'.
#include "kernels/cuda/attention.h"

namespace krait::cuda {

bool CudnnAttentionForward(Tensor, Tensor, Tensor, Tensor, Tensor, const Documents&,
                           const CudnnCalls&, const AttentionScratch&, const Context&) {
  return false;
}

bool CudnnAttentionBackward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                            const Documents&, const CudnnCalls&, const AttentionScratch&,
                            const Context&) {
  return false;
}

}  // namespace krait::cuda
