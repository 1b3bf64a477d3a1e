#include "parallel/mpi.h"

#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "parallel/collective_log.h"
#include "parallel/watchdog.h"

namespace krait {
namespace {

void Check(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(result, text, &length);
  Fatal(ExitCode::kCollective, __FILE__, __LINE__, std::string(call) + ": " + text);
}

constexpr int kAbortSeconds = 5;
// Until the config says otherwise: the default of train.hang_timeout.
constexpr double kHangSeconds = 600;

int g_rank = 0;  // for AbortAll

// Ends all ranks. MPI_Abort is the one call that may come from any thread at any time.
void AbortAll(ExitCode code) {
  ExitWithin(kAbortSeconds, code);  // where MPI_Abort does not return
  std::fprintf(stderr, "krait: rank %d ends all ranks (exit code %d)\n", g_rank,
               static_cast<int>(code));
  MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code));
  _exit(static_cast<int>(code));
}

class MpiWorld : public World {
 public:
  MpiWorld(int rank, int size, int local_rank, int local_size, int machine,
           std::unique_ptr<Watchdog> watchdog)
      : World(rank, size, local_rank, local_size, machine), watchdog_(std::move(watchdog)) {}
  ~MpiWorld() override {
    // Other ranks may still be at work on their own. They are waited for by messages, which say who
    // is missing, and not in MPI_Finalize: mpirun can crash when ranks fail while others are there.
    const LongPhase phase;
    Barrier();
    const CollectiveScope scope("MPI_Finalize", {.last_rank = size() - 1, .ranks = size()});
    SetFatalHook(nullptr);
    MPI_Finalize();
  }

  void SetHangTimeout(double seconds, const std::string& folder) override {
    watchdog_->Set(seconds, folder);
  }

  [[noreturn]] void Abort(ExitCode code) override {
    AbortAll(code);
    std::abort();
  }

 private:
  void Transfer(const std::vector<Message>& sends, const std::vector<Message>& receives,
                const std::function<void(int)>& waits_for) override {
    // Counts are int: large messages travel in parts.
    constexpr int64_t kPart = int64_t{1} << 30;
    std::vector<MPI_Request> requests;
    std::vector<int> ranks;  // of the requests
    const auto parts = [&](const Message& message, const auto& start) {
      KRAIT_CHECK(message.rank != rank() && message.rank >= 0 && message.rank < size());
      for (int64_t begin = 0; begin < message.bytes; begin += kPart) {
        const auto bytes = static_cast<int>(std::min(kPart, message.bytes - begin));
        ranks.push_back(message.rank);
        start(static_cast<char*>(message.data) + begin, bytes, message.rank,
              &requests.emplace_back(MPI_REQUEST_NULL));
      }
    };
    for (const Message& message : receives) {
      parts(message, [](char* data, int bytes, int from, MPI_Request* request) {
        Check(MPI_Irecv(data, bytes, MPI_BYTE, from, /*tag=*/0, MPI_COMM_WORLD, request),
              "MPI_Irecv");
      });
    }
    for (const Message& message : sends) {
      parts(message, [](char* data, int bytes, int to, MPI_Request* request) {
        Check(MPI_Isend(data, bytes, MPI_BYTE, to, /*tag=*/0, MPI_COMM_WORLD, request),
              "MPI_Isend");
      });
    }
    // In steps, not by MPI_Waitall: who is missing is known while it is missing.
    const auto count = static_cast<int>(requests.size());
    std::vector<int> done(requests.size());
    for (size_t first = 0; first < requests.size();) {
      if (requests[first] == MPI_REQUEST_NULL) {
        ++first;
        continue;
      }
      waits_for(ranks[first]);
      int ready = 0;
      Check(MPI_Waitsome(count, requests.data(), &ready, done.data(), MPI_STATUSES_IGNORE),
            "MPI_Waitsome");
    }
  }

  std::unique_ptr<Watchdog> watchdog_;  // from before MPI starts to after its end
};

}  // namespace

std::string MpiLibrary() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  Check(MPI_Get_library_version(text, &length), "MPI_Get_library_version");
  // Open MPI: "Open MPI v4.1.4, package: ...".
  return std::string(text, std::strcspn(text, ",\n"));
}

std::unique_ptr<World> StartMpiWorld(int* argc, char*** argv) {
  const Launch launch = LaunchOfThisProcess();
  auto watchdog = std::make_unique<Watchdog>(launch.rank, kHangSeconds, ".");
  auto start = std::make_unique<CollectiveScope>(
      "MPI_Init", CollectiveShape{.last_rank = launch.ranks - 1, .ranks = launch.ranks});
  int provided = 0;
  Check(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
  Check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  int rank = 0, size = 1, local_rank = 0, local_size = 1;
  Check(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  Check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  MPI_Comm machine = MPI_COMM_NULL;
  Check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &machine),
        "MPI_Comm_split_type");
  Check(MPI_Comm_rank(machine, &local_rank), "MPI_Comm_rank");
  Check(MPI_Comm_size(machine, &local_size), "MPI_Comm_size");
  int first = rank;
  Check(MPI_Bcast(&first, 1, MPI_INT, /*root=*/0, machine), "MPI_Bcast");
  Check(MPI_Comm_free(&machine), "MPI_Comm_free");
  g_rank = rank;
  SetFatalHook(AbortAll);
  start.reset();
  return std::make_unique<MpiWorld>(rank, size, local_rank, local_size, first, std::move(watchdog));
}

}  // namespace krait
