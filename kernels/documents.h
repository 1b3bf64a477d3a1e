// Where documents begin in the sequences of a call, and where the call stands in its sequences.
// Plain C++: also included by .cu files.
//
// Positions are absolute: they count from the first token of the whole sequence. Token t of a call
// sits at position first_position + t; a call that is the second piece of a cut sequence has
// first_position > 0, and what ops carry from piece to piece (states, a key/value prefix) stands
// for the positions before it.
#ifndef KRAIT_KERNELS_DOCUMENTS_H_
#define KRAIT_KERNELS_DOCUMENTS_H_

#include <cstdint>

#include "kernels/tensor.h"

namespace krait {

struct Documents {
  // [B,T] i32: the position of the first token of each token's document. Token t of row b begins a
  // document iff doc_start[b,t] == first_position + t, also for t = 0: what came before is then cut
  // off. Undefined: nothing is cut off.
  Tensor doc_start;
  int64_t first_position = 0;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_DOCUMENTS_H_
