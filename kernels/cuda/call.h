// How an op's dispatch calls kernels/cuda: KRAIT_CUDA(RmsNormForward(h, y, ...)). In a build
// without CUDA there are no CUDA tensors to compute with, and the call is fatal; it is compiled, so
// that it cannot go stale, but not linked, so that no stub of the function is needed.
#ifndef KRAIT_KERNELS_CUDA_CALL_H_
#define KRAIT_KERNELS_CUDA_CALL_H_

#include "kernels/base/check.h"

#ifdef KRAIT_WITH_CUDA
#define KRAIT_CUDA(call) ::krait::cuda::call
#else
#define KRAIT_CUDA(call)                      \
  do {                                        \
    if constexpr (false) ::krait::cuda::call; \
    KRAIT_FATAL("this build has no CUDA");    \
  } while (false)
#endif

#endif  // KRAIT_KERNELS_CUDA_CALL_H_
