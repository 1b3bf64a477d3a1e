#include "model/sequence_parallel.h"

namespace krait {

Tensor GatherRows(const char* what, Tensor own, const PassContext& pass) {
  const Tensor rows = PartialRows(own, pass);
  GatherRows(what, rows, own, pass);
  return rows;
}

void GatherRows(const char* what, Tensor rows, Tensor own, const PassContext& pass) {
  if (pass.shape.ranks > 1) pass.groups->tensor().AllGather(what, rows, own, *pass.ctx);
}

Tensor PartialRows(Tensor own, const PassContext& pass) {
  if (pass.shape.ranks == 1) return own;
  return pass.ctx->scratch->Alloc(own.dtype(), {pass.shape.tokens(), own.dim(1)});
}

void SumRows(const char* what, Tensor own, Tensor partial, const PassContext& pass) {
  if (pass.shape.ranks > 1) pass.groups->tensor().ReduceScatterSum(what, own, partial, *pass.ctx);
}

Tensor GatherRowsBeside(const char* what, Tensor own, const PassContext& pass) {
  if (pass.shape.ranks == 1) return own;
  const Tensor rows = PartialRows(own, pass);
  pass.groups->tensor().AllGather(what, rows, own, pass.groups->beside().Behind(*pass.ctx));
  return rows;
}

void SumRowsBeside(const char* what, Tensor own, Tensor partial, const PassContext& pass) {
  if (pass.shape.ranks == 1) return;
  const Tensor received =
      pass.ctx->scratch->Alloc(own.dtype(), {(pass.shape.ranks - 1) * own.numel()});
  pass.groups->tensor().ReduceScatterSum(what, own, partial,
                                         pass.groups->beside().Behind(*pass.ctx), received);
}

void JoinTraffic(const PassContext& pass) {
  if (pass.shape.ranks > 1) pass.groups->beside().Join(*pass.ctx);
}

}  // namespace krait
