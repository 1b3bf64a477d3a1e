#include "parallel/world.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "kernels/base/check.h"
#include "parallel/collective_log.h"
#include "parallel/gpu.h"
#include "parallel/mpi.h"
#include "parallel/tcp.h"

namespace krait {
namespace {

class SingleWorld : public World {
 public:
  SingleWorld() : World(0, 1, 0, 1, 0) {}

 private:
  void Transfer(const std::vector<Message>&, const std::vector<Message>&,
                const std::function<void(int)>&) override {
    KRAIT_FATAL("a message of the only rank");
  }
};

constexpr char kAgreed[] = "krait/agreed";

// An error as bytes for the other ranks: its exit code, and its message behind a space.
std::string Packed(const absl::Status& status) {
  if (status.ok()) return "";
  return std::to_string(static_cast<int>(ExitCodeOf(status))) + " " + MessageOf(status);
}

}  // namespace

void World::Exchange(const std::vector<Message>& sends, const std::vector<Message>& receives,
                     const char* what) {
  if (sends.empty() && receives.empty()) return;
  CollectiveShape shape = {.first_rank = rank_, .last_rank = rank_};
  std::vector<int> others;
  const auto count = [&](const std::vector<Message>& messages, int64_t* bytes) {
    for (const Message& message : messages) {
      *bytes += message.bytes;
      shape.first_rank = std::min(shape.first_rank, message.rank);
      shape.last_rank = std::max(shape.last_rank, message.rank);
      others.push_back(message.rank);
    }
  };
  count(sends, &shape.bytes_sent);
  count(receives, &shape.bytes_received);
  std::sort(others.begin(), others.end());
  others.erase(std::unique(others.begin(), others.end()), others.end());
  shape.ranks = static_cast<int>(others.size()) + 1;
  CollectiveScope scope(what, shape);
  Transfer(sends, receives, [&scope](int rank) { scope.WaitsFor(rank); });
}

void World::Abort(ExitCode code) { _exit(static_cast<int>(code)); }

std::vector<int64_t> World::AllGather(int64_t mine) {
  std::vector<int64_t> all(static_cast<size_t>(size_));
  all[static_cast<size_t>(rank_)] = mine;
  std::vector<Message> sends, receives;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    sends.push_back({r, &mine, sizeof mine});
    receives.push_back({r, &all[static_cast<size_t>(r)], sizeof mine});
  }
  Exchange(sends, receives, "gather of numbers");
  return all;
}

std::vector<std::string> World::AllGather(std::string_view mine) {
  const std::vector<int64_t> bytes = AllGather(static_cast<int64_t>(mine.size()));
  std::vector<std::string> all(static_cast<size_t>(size_));
  std::vector<Message> sends, receives;
  for (int r = 0; r < size_; ++r) {
    std::string& part = all[static_cast<size_t>(r)];
    if (r == rank_) {
      part = mine;
      continue;
    }
    part.resize(static_cast<size_t>(bytes[static_cast<size_t>(r)]));
    if (!mine.empty()) {
      sends.push_back({r, const_cast<char*>(mine.data()), static_cast<int64_t>(mine.size())});
    }
    if (!part.empty()) receives.push_back({r, part.data(), static_cast<int64_t>(part.size())});
  }
  Exchange(sends, receives, "gather of texts");
  return all;
}

std::string World::Broadcast(std::string_view bytes) {
  return AllGather(first() ? bytes : std::string_view())[0];
}

std::unique_ptr<World> OneRankWorld() { return std::make_unique<SingleWorld>(); }

World* OrAlone(World* world) {
  static const std::unique_ptr<World> alone = OneRankWorld();
  return world != nullptr ? world : alone.get();
}

Launch LaunchOfThisProcess() {
  // What srun sets where its plugin speaks to Open MPI; without it MPI_Init would end the process.
  const bool pmix = std::getenv("PMIX_RANK") != nullptr;
  struct Variables {
    const char *launcher, *ranks, *rank;
    bool mpi;
  };
  for (const Variables& names :
       {Variables{"mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", true},
        Variables{"mpiexec", "PMI_SIZE", "PMI_RANK", true},
        Variables{"torchrun", "WORLD_SIZE", "RANK", false},
        // Set for the tasks of srun only; a batch script has SLURM_NTASKS and SLURM_PROCID too.
        Variables{"srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", pmix}}) {
    const char *ranks = std::getenv(names.ranks), *rank = std::getenv(names.rank);
    if (ranks == nullptr || std::atoi(ranks) <= 1) continue;
    // Some shells have a WORLD_SIZE that is nobody's.
    if (!names.mpi && rank == nullptr) continue;
    return {names.launcher, rank == nullptr ? 0 : std::atoi(rank), std::atoi(ranks), names.mpi};
  }
  return {};
}

bool StartedByMpirun() { return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr; }

absl::StatusOr<std::unique_ptr<World>> StartWorld(int* argc, char*** argv) {
  const Launch launch = LaunchOfThisProcess();
  if (launch.ranks == 1) return OneRankWorld();
  std::unique_ptr<World> world;
  if (!launch.mpi) {
    KRAIT_ASSIGN_OR_RETURN(const TcpJob job, TcpJobOfThisProcess(launch, *argc, *argv));
    KRAIT_ASSIGN_OR_RETURN(world, StartTcpWorld(job));
    ChooseGpu(*world);
    return world;
  }
  world = StartMpiWorld(argc, argv);
  ChooseGpu(*world);
  if (world->size() == launch.ranks) return world;
  return Error(ExitCode::kConfig,
               launch.rank > 0
                   ? ""
                   : launch.launcher + " started " + std::to_string(launch.ranks) + " ranks, but " +
                         MpiLibrary() + ", which krait uses, knows of " +
                         std::to_string(world->size()) +
                         ": start it with the mpirun of that MPI (with srun: --mpi=pmix)");
}

absl::Status Agree(World* world, const absl::Status& status) {
  if (world->size() == 1) return status;
  const std::vector<int64_t> failed = world->AllGather(int64_t{!status.ok()});
  if (std::find(failed.begin(), failed.end(), 1) == failed.end()) return absl::OkStatus();
  const std::vector<std::string> all = world->AllGather(Packed(status));
  ExitCode code = ExitCode::kOk;
  std::vector<std::pair<std::string, std::vector<int>>> messages;  // and the ranks that say so
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    const size_t space = all[r].find(' ');
    if (code == ExitCode::kOk) code = static_cast<ExitCode>(std::stoi(all[r].substr(0, space)));
    const std::string message = all[r].substr(space + 1);
    auto same = std::find_if(messages.begin(), messages.end(),
                             [&](const auto& other) { return other.first == message; });
    if (same == messages.end()) same = messages.insert(same, {message, {}});
    same->second.push_back(static_cast<int>(r));
  }
  std::string text;
  for (const auto& [message, ranks] : messages) {
    if (message.empty() || !world->first()) continue;
    text += text.empty() ? "" : "\n";
    if (ranks.size() < all.size()) text += "rank " + std::to_string(ranks.front()) + ": ";
    text += message;
  }
  absl::Status agreed = Error(code, text);
  agreed.SetPayload(kAgreed, absl::Cord());
  return agreed;
}

absl::Status StatusOfFirst(World* world, const absl::Status& status) {
  if (world->size() == 1) return status;
  const auto code =
      static_cast<ExitCode>(world->AllGather(static_cast<int64_t>(ExitCodeOf(status)))[0]);
  if (code == ExitCode::kOk) return absl::OkStatus();
  // All say the same, so that it is told without a rank.
  return Agree(world, Error(code, world->Broadcast(MessageOf(status))));
}

bool IsAgreed(const absl::Status& status) { return status.GetPayload(kAgreed).has_value(); }

}  // namespace krait
