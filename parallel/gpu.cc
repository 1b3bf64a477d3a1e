#include "parallel/gpu.h"

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "parallel/nccl.h"

namespace krait {

void ChooseGpu(const World& world) {
  if (world.local_size() == 1) return;
  // A launcher may have shown each rank a GPU of its own: then there is one to choose from.
  const int gpus = cuda::DeviceCount();
  if (gpus > 0) cuda::UseDevice(world.local_rank() % gpus);
}

absl::Status CheckGpus(World* world) {
  if (world->size() == 1) return absl::OkStatus();
  const std::string nccl = NcclLibrary();
  if (nccl.empty()) {
    return Agree(world, Error(ExitCode::kConfig,
                              "train.device: several ranks on GPUs need NCCL, which this build was "
                              "made without; the configure step says how to get it"));
  }
  const std::vector<std::string> gpus = world->AllGather(cuda::DeviceId());
  absl::Status status;
  for (size_t r = 0; r < gpus.size() && status.ok(); ++r) {
    const auto first =
        static_cast<size_t>(std::find(gpus.begin(), gpus.end(), gpus[r]) - gpus.begin());
    if (first == r || NcclSharesGpus()) continue;
    status = Error(ExitCode::kConfig,
                   "train.device: ranks " + std::to_string(first) + " and " + std::to_string(r) +
                       " would share one GPU, which " + nccl +
                       " does not allow: start one rank per GPU of a machine. From NCCL 2.30.3 on "
                       "launch/run --share-gpus lets ranks share one, to try a layout");
  }
  return Agree(world, status);
}

}  // namespace krait
