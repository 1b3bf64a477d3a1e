// bf16 on the CPU: an op widens its bf16 operands into scratch memory, computes in f32, and rounds
// the results. So a CPU op under bf16 is exactly the rounding of its f32 version on the widened
// operands: slow, and the yardstick of the CUDA kernels.
#ifndef KRAIT_KERNELS_CPU_WIDENED_H_
#define KRAIT_KERNELS_CPU_WIDENED_H_

#include <array>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cpu {

// Stands between an op's operands and its f32 code:
//   cpu::Widened wide(ctx);
//   x = wide.In(x), y = wide.Out(y);        // bf16 on the CPU: f32 copies; all else: unchanged
// When it goes out of scope the outputs are rounded to nearest even and the scratch memory is given
// back. Tensors that are one memory get a copy each.
class Widened {
 public:
  explicit Widened(const Context& ctx) : ctx_(ctx) {}
  ~Widened();
  Widened(const Widened&) = delete;
  Widened& operator=(const Widened&) = delete;

  Tensor In(Tensor t);
  Tensor Out(Tensor t);    // every element is written
  Tensor InOut(Tensor t);  // read, or written in part

 private:
  Tensor Copy(Tensor t);

  struct Rounded {
    Tensor to, from;
  };
  const Context& ctx_;
  int64_t mark_ = -1;
  std::array<Rounded, 8> outputs_;
  int count_ = 0;
};

// to = from, of one shape, between f32, f64 and bf16; rows may be strided.
void Convert(Tensor to, Tensor from);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_WIDENED_H_
