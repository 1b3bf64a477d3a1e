// Between host memory and tensors of either device: the one way in which code outside kernels/
// fills a tensor from the host or reads it there.
#ifndef KRAIT_KERNELS_TRANSFER_H_
#define KRAIT_KERNELS_TRANSFER_H_

#include <cstdint>
#include <vector>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// Copies the elements of `from`, contiguous or with strided rows, in row-major order. Enqueued on
// ctx.stream behind earlier work and waited for. Nothing while planning.
void Download(void* to, Tensor from, const Context& ctx);
void Upload(Tensor to, const void* from, const Context& ctx);

// A few i64, as many as `to` has elements: enqueued and not waited for.
void UploadNumbers(Tensor to, const std::vector<int64_t>& from, const Context& ctx);

// The elements as floats (f32, bf16, f64) in row-major order.
std::vector<float> DownloadFloats(Tensor from, const Context& ctx);
// The elements of a small f64 tensor.
std::vector<double> DownloadDoubles(Tensor from, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_TRANSFER_H_
