// The batch of a pass on the model's device, from rows in host memory.
#ifndef KRAIT_TRAINER_TRAIN_PASS_BATCH_H_
#define KRAIT_TRAINER_TRAIN_PASS_BATCH_H_

#include <cstdint>

#include "data/sampler.h"
#include "kernels/arena.h"
#include "model/hybrid_model.h"

namespace krait {

class PassBatch {
 public:
  // For passes of up to `rows` sequences of `seq_len` tokens, which `ranks` tensor ranks run
  // together. On the CPU a pass is a view of the host's rows and takes no memory from `arena`.
  PassBatch(Device device, int64_t rows, int64_t seq_len, Arena* arena, int ranks = 1);

  // Rows [first, first + count) of `batch`, which stays as it is while the pass is computed.
  // Document starts are left undefined where no row begins a second document.
  Batch Of(const TokenBatch& batch, int64_t first, int64_t count, const Context& ctx) const;
  // For planning, in a measuring arena: no values, all operands defined.
  static Batch Planned(int64_t rows, int64_t seq_len, Arena* arena, int ranks = 1);

 private:
  int ranks_;
  Tensor tokens_, targets_,
      doc_start_;  // [rows, seq_len] i32 in device memory; undefined on the CPU
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_PASS_BATCH_H_
