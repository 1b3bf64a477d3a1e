#include "parallel/nccl.h"

#include <nccl.h>

#include <cstdlib>
#include <cstring>

#include "kernels/base/check.h"
#include "parallel/collective_log.h"

namespace krait {
namespace {

void Check(ncclResult_t result, const char* call, ncclComm_t comm = nullptr) {
  if (result == ncclSuccess) return;
  const char* const last = ncclGetLastError(comm);
  std::string text = std::string(call) + ": " + ncclGetErrorString(result);
  if (last != nullptr && *last != '\0') text += std::string(" (") + last + ")";
  Fatal(ExitCode::kCollective, __FILE__, __LINE__, text);
}

int Version() {
  int version = 0;
  Check(ncclGetVersion(&version), "ncclGetVersion");
  return version;
}

ncclComm_t CommOf(void* comm) { return static_cast<ncclComm_t>(comm); }

}  // namespace

std::string NcclLibrary() {
  const int version = Version();
  return "NCCL " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) +
         "." + std::to_string(version % 100);
}

bool NcclSharesGpus() {
  const char* const enabled = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  return enabled != nullptr && std::string_view(enabled) == "1" &&
         Version() >= NCCL_VERSION(2, 30, 3);
}

std::shared_ptr<NcclRanks> NcclRanks::OfWorld(World* world) {
  ncclUniqueId id = {};
  if (world->first()) Check(ncclGetUniqueId(&id), "ncclGetUniqueId");
  const std::string sent = world->Broadcast(std::string_view(id.internal, sizeof id.internal));
  KRAIT_CHECK(sent.size() == sizeof id.internal);
  std::memcpy(id.internal, sent.data(), sizeof id.internal);
  const CollectiveScope scope("ncclCommInitRank",
                              {.last_rank = world->size() - 1, .ranks = world->size()});
  ncclComm_t comm = nullptr;
  Check(ncclCommInitRank(&comm, world->size(), id, world->rank()), "ncclCommInitRank");
  return std::shared_ptr<NcclRanks>(new NcclRanks(comm));
}

NcclRanks::~NcclRanks() { Check(ncclCommDestroy(CommOf(comm_)), "ncclCommDestroy"); }

std::shared_ptr<NcclRanks> NcclRanks::Split(int color) const {
  const CollectiveScope scope("ncclCommSplit", {});
  int key = 0;
  Check(ncclCommUserRank(CommOf(comm_), &key), "ncclCommUserRank", CommOf(comm_));
  ncclComm_t part = nullptr;
  Check(ncclCommSplit(CommOf(comm_), color < 0 ? NCCL_SPLIT_NOCOLOR : color, key, &part, nullptr),
        "ncclCommSplit", CommOf(comm_));
  return part == nullptr ? nullptr : std::shared_ptr<NcclRanks>(new NcclRanks(part));
}

void NcclRanks::Exchange(const std::vector<Message>& sends, const std::vector<Message>& receives,
                         void* stream) const {
  if (sends.empty() && receives.empty()) return;
  ncclComm_t const comm = CommOf(comm_);
  cudaStream_t const on = static_cast<cudaStream_t>(stream);
  Check(ncclGroupStart(), "ncclGroupStart");
  for (const Message& message : sends) {
    Check(ncclSend(message.data, static_cast<size_t>(message.bytes), ncclUint8, message.rank, comm,
                   on),
          "ncclSend", comm);
  }
  for (const Message& message : receives) {
    Check(ncclRecv(message.data, static_cast<size_t>(message.bytes), ncclUint8, message.rank, comm,
                   on),
          "ncclRecv", comm);
  }
  Check(ncclGroupEnd(), "ncclGroupEnd", comm);
}

void NcclRanks::AllGather(void* out, const void* in, int64_t bytes, void* stream) const {
  Check(ncclAllGather(in, out, static_cast<size_t>(bytes), ncclUint8, CommOf(comm_),
                      static_cast<cudaStream_t>(stream)),
        "ncclAllGather", CommOf(comm_));
}

}  // namespace krait
