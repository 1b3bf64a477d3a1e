// GPU memory that ranks of one machine read from each other. Beside a computation copy engines do
// it, which take nothing from that but memory bandwidth. (The same traffic by NCCL's send and
// receive took 8 % of a step of jamba-3b on two H100s, in blocks that products waited for.)
#ifndef KRAIT_PARALLEL_PEER_MEMORY_H_
#define KRAIT_PARALLEL_PEER_MEMORY_H_

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/arena.h"
#include "kernels/context.h"
#include "kernels/tensor.h"
#include "parallel/world.h"

namespace krait {

class PeerMemory {
 public:
  // Lets the other ranks read `segments`; which of them reach each other is found out here, by
  // reading; a rank that reads wrong bytes says so on standard error and does not reach. All
  // ranks of the world call it. The segments outlive it. Places in them that ranks know by number:
  // `regions`, each a contiguous CUDA tensor in one of them, as many on each rank; undefined ones
  // are left out. Ranks of one `signature` have, at each point of the program, the same tensors at
  // the same places of those segments that are not the regions'.
  PeerMemory(World* world, const std::vector<const Arena*>& segments,
             const std::vector<Tensor>& regions, uint64_t signature = 0);
  // Waits for the other ranks: none reads this one's memory afterwards. All ranks call it.
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Whether all these ranks reach each other's memory: the same answer on each.
  bool Reaches(const std::vector<int>& ranks) const;
  // Whether they also have one signature.
  bool Mirrors(const std::vector<int>& ranks) const;
  // Whether an address lies in one of this rank's segments.
  bool Holds(const void* address) const { return SegmentOf(address) >= 0; }

  // Enqueued on `stream`, a cudaStream_t: bytes [begin, begin + bytes) of a region of another rank
  // that is reached, to `to`, memory of this one's GPU.
  void Read(void* to, int rank, int region, int64_t begin, int64_t bytes, void* stream) const;

  // What a rank that mirrors this one has at the place of `at`, contiguous: for kernels that read
  // it over NVLink.
  Tensor Same(int rank, Tensor at) const;
  // Enqueued on ctx.stream: the same to `to`, as large. A pass's own stream reads by a kernel,
  // since copies would queue behind those of gradients and weights, which have the copy engines;
  // streams beside a pass leave it the multiprocessors.
  void ReadSame(Tensor to, int rank, Tensor at, const Context& ctx) const;

  // Enqueued on ctx.stream: what follows waits until the other ones of `ranks` have come as far
  // with theirs. Ranks meet in the same order on streams of one ctx.side.
  void Meet(const std::vector<int>& ranks, const Context& ctx);

 private:
  static constexpr int kSides = 4;
  int SegmentOf(const void* address) const;
  const char* Base(int segment) const {
    return static_cast<const char*>(segments_[static_cast<size_t>(segment)]->base());
  }
  struct Peer {
    std::vector<void*> segments;  // as mapped here; of this rank and of those not reached: none
    std::vector<int64_t> region_segment, region_offset;
    uint64_t signature = 0;
    uint32_t* flags = nullptr;             // its flags_
    std::array<uint32_t, kSides> meets{};  // with it
  };

  World* world_;
  std::vector<const Arena*> segments_;
  Arena flags_;  // [kSides, ranks] u32: how often each of the others has come; then the probes
  std::vector<Peer> peers_;
  std::vector<bool> reach_;  // [ranks * ranks]
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_PEER_MEMORY_H_
