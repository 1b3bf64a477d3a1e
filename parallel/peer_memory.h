// GPU memory that ranks of one machine read from each other: copies by the GPUs' copy engines,
// which take nothing from the computation beside them but memory bandwidth. (The same traffic by
// NCCL's send and receive took 8 % of a step of jamba-3b on two H100s, in blocks that products
// waited for.)
#ifndef KRAIT_PARALLEL_PEER_MEMORY_H_
#define KRAIT_PARALLEL_PEER_MEMORY_H_

#include <cstdint>
#include <vector>

#include "kernels/arena.h"
#include "kernels/tensor.h"
#include "parallel/world.h"

namespace krait {

class PeerMemory {
 public:
  // Lets the other ranks read `regions`, each a contiguous CUDA tensor in one of `segments`; which
  // of them reach each other is found out here. All ranks of the world call it, with as many
  // regions; undefined ones are left out. The segments outlive it.
  PeerMemory(World* world, const std::vector<const Arena*>& segments,
             const std::vector<Tensor>& regions);
  // Waits for the other ranks: none reads this one's memory afterwards. All ranks call it.
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Whether all these ranks reach each other's memory: the same answer on each.
  bool Reaches(const std::vector<int>& ranks) const;
  // Enqueued on `stream`, a cudaStream_t: bytes [begin, begin + bytes) of a region of another rank
  // that is reached, to `to`, memory of this one's GPU.
  void Read(void* to, int rank, int region, int64_t begin, int64_t bytes, void* stream) const;

  // Enqueued on `stream`: what follows waits until the other ones of `ranks` have
  // come as far with theirs. Ranks meet in the same order, on one stream each.
  void Meet(const std::vector<int>& ranks, void* stream);

 private:
  struct Peer {
    std::vector<void*> segments;  // as mapped here; of this rank and of those not reached: none
    std::vector<int64_t> region_segment, region_offset;
    uint32_t* flags = nullptr;  // its flag of each rank
    uint32_t meets = 0;         // with it
  };

  World* world_;
  Arena flags_;  // [ranks] u32: how often each of the others has come
  std::vector<Peer> peers_;
  std::vector<bool> reach_;  // [ranks * ranks]
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_PEER_MEMORY_H_
