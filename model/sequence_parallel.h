// Sequence parallelism (Korthikanti et al., 2205.05198). Tensor ranks compute a mixer or an MLP
// together, each with its part of heads, channels or columns over all tokens of the pass; between
// these regions each rank owns tokens / ranks consecutive rows. A region begins with a gather of
// its rows and ends with the sum of the ranks' products, of which each rank takes its own rows; the
// backward is the mirror. On one rank nothing here does anything.
#ifndef KRAIT_MODEL_SEQUENCE_PARALLEL_H_
#define KRAIT_MODEL_SEQUENCE_PARALLEL_H_

#include "kernels/tensor.h"
#include "model/sublayer.h"

namespace krait {

// The rows of all ranks [tokens,C] from this rank's `own` [own_tokens,C]: from scratch memory, or
// `own` itself.
Tensor GatherRows(const char* what, Tensor own, const PassContext& pass);
// The same into `rows`; nothing where the two are one memory.
void GatherRows(const char* what, Tensor rows, Tensor own, const PassContext& pass);

// Where a rank's product of all rows [tokens,C], a part of the sum, goes: scratch memory, or `own`
// itself.
Tensor PartialRows(Tensor own, const PassContext& pass);
// own = this rank's rows of the sum of all ranks' `partial`.
void SumRows(const char* what, Tensor own, Tensor partial, const PassContext& pass);

// Two of these beside the computation at hand, for a backward pass: what they bring is there for
// what is enqueued after JoinTraffic. Until then memory of ctx.scratch must not be given back, and
// `partial` stays as it is.
Tensor GatherRowsBeside(const char* what, Tensor own, const PassContext& pass);
void SumRowsBeside(const char* what, Tensor own, Tensor partial, const PassContext& pass);
void JoinTraffic(const PassContext& pass);

}  // namespace krait

#endif  // KRAIT_MODEL_SEQUENCE_PARALLEL_H_
