// parallel/nccl.h in a build without NCCL: no rank has a GPU that another one could reach.
#include "kernels/base/check.h"
#include "parallel/nccl.h"

namespace krait {
namespace {

[[noreturn]] void NoNccl() { KRAIT_FATAL("this build has no NCCL"); }

}  // namespace

std::string NcclLibrary() { return ""; }
bool NcclSharesGpus() { return false; }
std::shared_ptr<NcclRanks> NcclRanks::OfWorld(World* /*world*/) { NoNccl(); }
NcclRanks::~NcclRanks() = default;
std::shared_ptr<NcclRanks> NcclRanks::Split(int /*color*/) const { NoNccl(); }
void NcclRanks::Exchange(const std::vector<Message>&, const std::vector<Message>&, void*) const {
  NoNccl();
}
void NcclRanks::AllGather(void* /*out*/, const void* /*in*/, int64_t /*bytes*/,
                          void* /*stream*/) const {
  NoNccl();
}

}  // namespace krait
