// NCCL: what the GPUs of several ranks send each other. No other header knows of it. In a build
// without NCCL the same functions exist: NcclLibrary() is empty and the others are fatal.
#ifndef KRAIT_PARALLEL_NCCL_H_
#define KRAIT_PARALLEL_NCCL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "parallel/world.h"

namespace krait {

// The NCCL in use: "NCCL 2.28.9"; "" in a build without.
std::string NcclLibrary();
// Whether it lets several ranks share a GPU: from 2.30.3 on, where NCCL_MULTI_RANK_GPU_ENABLE=1.
bool NcclSharesGpus();

// A communicator of NCCL: the GPUs of some ranks, each the current device of its rank. Failures end
// all ranks through Fatal(kCollective).
//
// Work of several communicators may be under way at once, on streams beside each other. It then
// needs room on the GPU at the same time, or ranks can wait for each other for ever: a communicator
// takes up to 32 blocks, so that three fit on a GPU of 132 multiprocessors. (NCCL's implicit launch
// order would need no such room, but lets what is called later wait for all that is queued on the
// other stream: 18 ms of a 126 ms step of jamba-3b on two tensor ranks. Fewer blocks beside the
// passes make it worse: 8 move 50 GB/s.)
class NcclRanks {
 public:
  ~NcclRanks();
  NcclRanks(const NcclRanks&) = delete;
  NcclRanks& operator=(const NcclRanks&) = delete;

  // Of all ranks of the world, which all call this; a rank's place is its number there.
  static std::shared_ptr<NcclRanks> OfWorld(World* world);
  // A communicator of the ranks with the same `color`, in their order here; null for color -1. All
  // ranks of this one call it.
  std::shared_ptr<NcclRanks> Split(int color) const;

  // World::Exchange between GPUs: ranks are places here, data is in device memory. Enqueued on
  // `stream`, a cudaStream_t, behind its earlier work.
  void Exchange(const std::vector<Message>& sends, const std::vector<Message>& receives,
                void* stream) const;
  // out = every rank's `in` of `bytes` bytes, in their order; `in` may be its part of out.
  void AllGather(void* out, const void* in, int64_t bytes, void* stream) const;

 private:
  explicit NcclRanks(void* comm) : comm_(comm) {}

  void* comm_;  // ncclComm_t
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_NCCL_H_
