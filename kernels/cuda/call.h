// How an op's dispatch calls kernels/cuda: KRAIT_CUDA(RmsNormForward(h, y, ...)). In a build
// without CUDA there are no CUDA tensors to compute with, and the call is fatal; its arguments are
// not evaluated, so that no stub of the function is needed.
#ifndef KRAIT_KERNELS_CUDA_CALL_H_
#define KRAIT_KERNELS_CUDA_CALL_H_

#include "kernels/base/check.h"

#ifdef KRAIT_WITH_CUDA
#define KRAIT_CUDA(call) ::krait::cuda::call
#else
#define KRAIT_CUDA(call) KRAIT_FATAL("this build has no CUDA")
#endif

#endif  // KRAIT_KERNELS_CUDA_CALL_H_
