#include "parallel/peer_memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/cuda/peer.h"
#include "kernels/cuda/runtime.h"

namespace krait {
namespace {

// Names of allocations have a meaning on the machine where they were made: this boot of it.
std::string Machine() {
  char id[64] = "";
  if (std::FILE* const file = std::fopen("/proc/sys/kernel/random/boot_id", "re")) {
    if (std::fgets(id, sizeof id, file) == nullptr) id[0] = '\0';
    std::fclose(file);
  }
  return id;
}

// What each rank leaves beside its flags for the others to read: where an IOMMU or PCIe's access
// control (ACS) stands between GPUs, memory maps without an error and reads as something else.
constexpr int64_t kProbeWords = 4096, kProbeBytes = kProbeWords * int64_t{sizeof(uint32_t)};
std::vector<uint32_t> ProbeWords(int rank) {
  std::vector<uint32_t> words(kProbeWords);
  for (size_t i = 0; i < words.size(); ++i) {
    words[i] = (static_cast<uint32_t>(i) + 1) * 2654435761u ^ static_cast<uint32_t>(rank);
  }
  return words;
}

// A list of texts and numbers as bytes, and back.
void Put(std::string* out, const std::string& text) {
  const auto size = static_cast<int64_t>(text.size());
  out->append(reinterpret_cast<const char*>(&size), sizeof size);
  out->append(text);
}
void Put(std::string* out, int64_t number) {
  out->append(reinterpret_cast<const char*>(&number), sizeof number);
}
struct Parcel {
  std::string_view left;
  int64_t Number() {
    int64_t number = 0;
    KRAIT_CHECK(left.size() >= sizeof number);
    std::memcpy(&number, left.data(), sizeof number);
    left.remove_prefix(sizeof number);
    return number;
  }
  std::string Text() {
    const auto size = static_cast<size_t>(Number());
    KRAIT_CHECK(left.size() >= size);
    std::string text(left.substr(0, size));
    left.remove_prefix(size);
    return text;
  }
};

}  // namespace

PeerMemory::PeerMemory(World* world, const std::vector<const Arena*>& segments,
                       const std::vector<Tensor>& regions, uint64_t signature)
    : world_(world),
      segments_(segments),
      flags_("flags of other ranks", Device::kCuda,
             kSides * world->size() * int64_t{sizeof(uint32_t)} + 2 * kProbeBytes),
      peers_(static_cast<size_t>(world->size())),
      reach_(peers_.size() * peers_.size()) {
  std::string mine;
  Put(&mine, Machine());
  Put(&mine, cuda::ExportMemory(flags_.base()));
  for (const Arena* segment : segments) Put(&mine, cuda::ExportMemory(segment->base()));
  for (const Tensor& region : regions) {
    const char* const at = static_cast<const char*>(region.defined() ? region.raw() : nullptr);
    const int segment = SegmentOf(at);
    KRAIT_CHECK(at == nullptr || segment >= 0);
    Put(&mine, int64_t{segment});
    Put(&mine, at == nullptr ? int64_t{0} : at - Base(segment));
  }
  Put(&mine, static_cast<int64_t>(signature));

  uint32_t* const probe = static_cast<uint32_t*>(flags_.base()) + kSides * world->size();
  cuda::CopyToDevice(probe, ProbeWords(world->rank()).data(), kProbeBytes);
  cuda::Synchronize();  // the flags are zero before anybody knows of them
  const std::vector<std::string> all = world->AllGather(mine);
  std::string reached(peers_.size(), '0');
  for (size_t r = 0; r < peers_.size(); ++r) {
    Peer& peer = peers_[r];
    Parcel parcel{all[r]};
    const bool here = parcel.Text() == Machine() && static_cast<int>(r) != world->rank();
    bool open = here;
    const auto map = [&](const std::string& name) -> void* {
      void* const memory = open ? cuda::OpenMemory(name) : nullptr;
      open = memory != nullptr;
      return memory;
    };
    peer.flags = static_cast<uint32_t*>(map(parcel.Text()));
    for (size_t s = 0; s < segments.size(); ++s) {
      if (void* const memory = map(parcel.Text()); memory != nullptr) {
        peer.segments.push_back(memory);
      }
    }
    for (size_t i = 0; i < regions.size(); ++i) {
      peer.region_segment.push_back(parcel.Number());
      peer.region_offset.push_back(parcel.Number());
    }
    peer.signature = static_cast<uint64_t>(parcel.Number());
    if (open) {
      std::vector<uint32_t> seen(kProbeWords);
      cuda::CopyOnDevice(probe + kProbeWords, peer.flags + kSides * world->size(), kProbeBytes,
                         nullptr);
      cuda::CopyToHost(seen.data(), probe + kProbeWords, kProbeBytes);
      open = seen == ProbeWords(static_cast<int>(r));
      if (!open) {
        std::fprintf(
            stderr,
            "krait: rank %d reads wrong bytes from the GPU of rank %zu: an IOMMU or PCIe's "
            "access control (ACS) may stand between them; they will use NCCL, which may "
            "need NCCL_P2P_DISABLE=1\n",
            world->rank(), r);
      }
    }
    if (open || static_cast<int>(r) == world->rank()) reached[r] = '1';
  }
  const std::vector<std::string> rows = world->AllGather(reached);
  for (size_t a = 0; a < rows.size(); ++a) {
    for (size_t b = 0; b < rows.size(); ++b) reach_[a * rows.size() + b] = rows[a][b] == '1';
  }
}

PeerMemory::~PeerMemory() {
  cuda::Synchronize();
  world_->Barrier();
  for (Peer& peer : peers_) {
    for (void* segment : peer.segments) cuda::CloseMemory(segment);
    if (peer.flags != nullptr) cuda::CloseMemory(peer.flags);
  }
}

int PeerMemory::SegmentOf(const void* address) const {
  for (size_t s = 0; s < segments_.size(); ++s) {
    const char* const base = Base(static_cast<int>(s));
    if (address >= base && address < base + segments_[s]->capacity()) return static_cast<int>(s);
  }
  return -1;
}

bool PeerMemory::Mirrors(const std::vector<int>& ranks) const {
  const uint64_t signature = peers_[static_cast<size_t>(world_->rank())].signature;
  return Reaches(ranks) && std::all_of(ranks.begin(), ranks.end(), [&](int r) {
           return peers_[static_cast<size_t>(r)].signature == signature;
         });
}

bool PeerMemory::Reaches(const std::vector<int>& ranks) const {
  for (const int a : ranks) {
    for (const int b : ranks) {
      if (!reach_[static_cast<size_t>(a) * peers_.size() + static_cast<size_t>(b)]) return false;
    }
  }
  return true;
}

void PeerMemory::Read(void* to, int rank, int region, int64_t begin, int64_t bytes,
                      void* stream) const {
  if (bytes == 0) return;
  const Peer& peer = peers_[static_cast<size_t>(rank)];
  const auto r = static_cast<size_t>(region);
  const char* const segment =
      static_cast<const char*>(peer.segments[static_cast<size_t>(peer.region_segment[r])]);
  cuda::CopyOnDevice(to, segment + peer.region_offset[r] + begin, bytes, stream);
}

Tensor PeerMemory::Same(int rank, Tensor at) const {
  KRAIT_CHECK(at.contiguous());
  const int segment = SegmentOf(at.raw());
  // Those of regions have places of their own on each rank.
  const std::vector<int64_t>& regions = peers_[static_cast<size_t>(world_->rank())].region_segment;
  KRAIT_CHECK(std::find(regions.begin(), regions.end(), segment) == regions.end());
  char* const there =
      static_cast<char*>(peers_[static_cast<size_t>(rank)].segments[static_cast<size_t>(segment)]);
  return Tensor(there + (static_cast<const char*>(at.raw()) - Base(segment)), at.dtype(),
                at.device(), {at.numel()});
}

void PeerMemory::ReadSame(Tensor to, int rank, Tensor at, const Context& ctx) const {
  if (at.numel() == 0) return;
  KRAIT_CHECK(to.contiguous() && to.dtype() == at.dtype() && to.numel() == at.numel());
  const Tensor there = Same(rank, at);
  if (ctx.side == 0) {
    Copy(to.View({to.numel()}), there, ctx);
  } else {
    cuda::CopyOnDevice(to.raw(), there.raw(), at.bytes(), ctx.stream);
  }
}

void PeerMemory::Meet(const std::vector<int>& ranks, const Context& ctx) {
  KRAIT_CHECK(ctx.side >= 0 && ctx.side < kSides);
  const auto side = static_cast<size_t>(ctx.side);
  uint32_t* const mine = static_cast<uint32_t*>(flags_.base()) + side * peers_.size();
  const int self = world_->rank();
  std::vector<cuda::Flag> theirs, own;
  for (const int r : ranks) {
    if (r == self) continue;
    Peer& peer = peers_[static_cast<size_t>(r)];
    const uint32_t meets = ++peer.meets[side];
    theirs.push_back({peer.flags + side * peers_.size() + static_cast<size_t>(self), meets});
    own.push_back({mine + r, meets});
  }
  cuda::WriteAndWait(theirs, own, ctx.stream);
}

}  // namespace krait
