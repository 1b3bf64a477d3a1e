// kernels/attention.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone. Plain
// C++.
#ifndef KRAIT_KERNELS_CUDA_ATTENTION_H_
#define KRAIT_KERNELS_CUDA_ATTENTION_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "kernels/context.h"
#include "kernels/documents.h"
#include "kernels/tensor.h"

namespace krait::cuda {

inline constexpr int64_t kMaxHeadDim = 256;

// --- Which calls of cuDNN an attention takes ---
//
// bf16 of some length is computed by cuDNN where the build has it and it accepts the shape, all
// else by the plain kernels. Documents are an additive mask [sequences, 1, T, T]: cuDNN can take
// them as ragged sequences only if the host knows their lengths. At long T the mask is large and
// most of what it masks is computed for nothing.
//
// cuDNN's deterministic backward holds the gradients of all scores of a call. Its rate grows with
// heads times sequences of a call (16 at T 4096: 335 TFLOP/s, 32: 395, 64: 432), so calls are as
// large as fit: of all heads of some sequences, or of some key heads of one sequence, or of a block
// of its queries, whose gradients of keys and values are then added up in f32.
inline constexpr int64_t kCudnnWorkspace = int64_t{2304} << 20, kCudnnMask = int64_t{256} << 20;
// Shorter calls take the plain kernels: a new shape costs cuDNN 50 ms of planning.
inline constexpr int64_t kCudnnShortest = 128, kCudnnLongestMasked = 8192;

struct CudnnCalls {
  int64_t sequences = 0, kv_heads = 0, queries = 0;  // of one call; no sequences: plain kernels
  int64_t workspace = 0;                             // bytes of scratch
};

// Elements between rows of the mask.
inline int64_t CudnnMaskStride(int64_t time) { return (time + 7) / 8 * 8; }

// The workspace that one head of one sequence asks for (cuDNN 9.19: that of the deterministic
// backward is 2 T^2 + 516 T bytes at head_dim 128, of the other 1028 T).
inline int64_t CudnnWorkspaceOfHead(int64_t queries, int64_t keys, int64_t head_dim,
                                    bool deterministic) {
  const auto up = [](int64_t n) { return (n + 127) / 128 * 128; };
  return deterministic ? 2 * up(queries) * up(keys) + (4 * up(head_dim) + 16) * up(keys)
                       : (8 * up(head_dim) + 16) * up(keys);
}

// With documents the deterministic backward is also the faster one.
inline bool CudnnDeterministic(bool documents, const Context& ctx) {
  return ctx.deterministic || documents;
}

inline bool CudnnTakesStrides(const Tensor& x) {
  return x.dtype() == DType::kBF16 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 &&
         x.stride(2) % 8 == 0;
}

// A function of sizes, strides and dtypes, so that a plan has it without a GPU; `operands` are all
// of the call that have heads, q and k the first two. The workspace is an upper bound of what is
// used: cuDNN is asked at run time, and what asks for more is cut into smaller calls.
inline CudnnCalls CudnnCallsOf(std::initializer_list<Tensor> operands, bool documents,
                               bool backward, const Context& ctx) {
  const Tensor& q = operands.begin()[0];
  const Tensor& k = operands.begin()[1];
  const int64_t batch = q.dim(0), time = q.dim(1), keys = k.dim(1), head_dim = q.dim(3);
  const int64_t heads = q.dim(2), kv_heads = k.dim(2), group = heads / kv_heads;
  CudnnCalls calls{0, kv_heads, time, 0};
  if (time < kCudnnShortest || batch * heads == 0) return calls;
  if (head_dim % 8 != 0 || head_dim > kMaxHeadDim) return calls;
  if (documents && (time > kCudnnLongestMasked || keys != time)) return calls;
  for (const Tensor& x : operands) {
    if (!CudnnTakesStrides(x)) return calls;
  }
  int64_t sequences = batch;
  calls.workspace = int64_t{1} << 20;
  if (documents) {
    const int64_t fit = std::max<int64_t>(1, kCudnnMask / (2 * time * CudnnMaskStride(time)));
    sequences = std::min(batch, fit);
  }
  if (backward) {
    const bool deterministic = CudnnDeterministic(documents, ctx);
    const auto of_head = [&] {
      return CudnnWorkspaceOfHead(calls.queries, keys, head_dim, deterministic);
    };
    const int64_t fit = kCudnnWorkspace / of_head();
    if (fit >= heads) {
      sequences = std::min(sequences, fit / heads);
    } else if (fit >= group) {
      sequences = 1;
      const int64_t count = (kv_heads + fit / group - 1) / (fit / group);
      calls.kv_heads = (kv_heads + count - 1) / count;  // of equal size
    } else {
      sequences = 1;
      calls.kv_heads = 1;
      for (int64_t blocks = 2; group * of_head() > kCudnnWorkspace; ++blocks) {
        calls.queries = ((time + blocks - 1) / blocks + 127) / 128 * 128;
        if (documents || calls.queries < 1024) return calls;
      }
    }
    calls.workspace += sequences * calls.kv_heads * group * of_head();
    calls.workspace = std::min(calls.workspace, kCudnnWorkspace);
  }
  calls.sequences = sequences;
  return calls;
}

// Scratch tensors; undefined where they are not needed.
struct AttentionScratch {
  Tensor mask;                    // [sequences, T, CudnnMaskStride(T)] bf16
  Tensor workspace;               // [bytes / 4] f32
  Tensor block_lse;               // of blocks of queries: [heads of a call, queries] f32,
  Tensor block_sums, block_part;  // [2, S, key heads of a call, P] f32 and bf16, for dk and dv
  Tensor partial_y, partial_lse;  // of the plain forward: [splits, B*H*T, P], [splits, B*H*T] f32
  Tensor delta;                   // of the plain backward: [B,H,T] f32
};

// By cuDNN where `calls` has some and it takes them, else by the plain kernels.
void AttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                      const Documents& documents, const CudnnCalls& calls,
                      const AttentionScratch& scratch, const Context& ctx);
void AttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse, Tensor q,
                       Tensor k, Tensor v, const Documents& documents, const CudnnCalls& calls,
                       const AttentionScratch& scratch, const Context& ctx);

// Both return false, with nothing enqueued, where the build has no cuDNN or it refuses the call.
bool CudnnAttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                           const Documents& documents, const CudnnCalls& calls,
                           const AttentionScratch& scratch, const Context& ctx);
bool CudnnAttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse,
                            Tensor q, Tensor k, Tensor v, const Documents& documents,
                            const CudnnCalls& calls, const AttentionScratch& scratch,
                            const Context& ctx);

// mask [sequences, T, CudnnMaskStride(T)] bf16 for the sequences from `first`: minus infinity where
// a key lies before the query's document, else 0 (also after the query).
void DocumentMask(Tensor mask, const Documents& documents, int64_t first, const Context& ctx);

// --- The plain kernels: any sizes, strides and addresses, head_dim up to 256 ---

// Rows of a block of the forward: queries times the heads that share a key head; few where there
// are few (decoding).
inline int64_t AttentionRows(int64_t rows) { return rows <= 16 ? 16 : 64; }

// In how many ranges of keys the forward cuts each row's, so that few queries with a long prefix
// fill the device. Each range has results of its own, which a second kernel merges.
inline constexpr int64_t kMaxAttentionSplits = 1056;
inline int64_t AttentionSplits(const Tensor& q, const Tensor& k) {
  const int64_t rows = q.dim(1) * (q.dim(2) / k.dim(2)), keys = k.dim(1);
  const int64_t tile = AttentionRows(rows), wanted = tile == 16 ? kMaxAttentionSplits : 264;
  const int64_t least = tile == 16 ? 64 : 256;
  const int64_t blocks = std::max<int64_t>(1, q.dim(0) * k.dim(2) * ((rows + tile - 1) / tile));
  return std::max<int64_t>(1, std::min(wanted / blocks, (keys + least - 1) / least));
}

void Rope(Tensor x, const Documents& documents, double theta, bool inverse, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_ATTENTION_H_
