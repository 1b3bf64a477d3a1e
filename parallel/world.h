// The processes of one run on the host: who they are, messages between them, agreement, and the end
// of all when one ends. MPI under its launchers, TCP under others (tcp.h), otherwise a single rank.
//
// One thread per rank issues everything here, in the same program order on every rank: a message
// has no other name than its place in that order. Failures end all ranks through
// Fatal(kCollective).
#ifndef KRAIT_PARALLEL_WORLD_H_
#define KRAIT_PARALLEL_WORLD_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

// Bytes for, or from, another rank of the world.
struct Message {
  int rank = 0;
  void* data = nullptr;
  int64_t bytes = 0;
};

class World {
 public:
  virtual ~World() = default;
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  // Among the ranks of this machine.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }
  int machine() const { return machine_; }  // the first rank of this one's machine
  bool first() const { return rank_ == 0; }

  // All messages travel at once; complete on return. The n-th message of a to b is received by b's
  // n-th receive from a, which has as many bytes. None goes to the rank itself. `what` is for the
  // report about a job that hangs. Without MPI only messages to and from the first rank are
  // possible.
  void Exchange(const std::vector<Message>& sends, const std::vector<Message>& receives,
                const char* what = "messages");

  // Ends all ranks with `code`, at once and from any thread.
  [[noreturn]] virtual void Abort(ExitCode code);

  // Of several ranks: this process ends with kCollective after so many seconds without progress,
  // its report goes to the folder (parallel/watchdog.h). Before the first call, which needs no
  // agreement: ten minutes, and the working folder.
  virtual void SetHangTimeout(double /*seconds*/, const std::string& /*folder*/) {}

  // Whether the tensors of CPU ranks can travel by Exchange.
  virtual bool carries_tensors() const { return true; }

  // Every rank's bytes, in rank order, on every rank.
  virtual std::vector<std::string> AllGather(std::string_view mine);
  // Every rank's number, likewise.
  virtual std::vector<int64_t> AllGather(int64_t mine);
  // The first rank's bytes on every rank; what the others pass is ignored.
  virtual std::string Broadcast(std::string_view bytes);
  void Barrier() { AllGather(int64_t{0}); }

 protected:
  World(int rank, int size, int local_rank, int local_size, int machine)
      : rank_(rank),
        size_(size),
        local_rank_(local_rank),
        local_size_(local_size),
        machine_(machine) {}

 private:
  // Exchange of at least one message. `waits_for` is called with ranks that are waited for.
  virtual void Transfer(const std::vector<Message>& sends, const std::vector<Message>& receives,
                        const std::function<void(int)>& waits_for) = 0;

  int rank_, size_, local_rank_, local_size_, machine_;
};

// A single process.
std::unique_ptr<World> OneRankWorld();
// The world, or that of this process alone where it is null.
World* OrAlone(World* world);

// How a launcher started this process as one of several ranks, by the variables that it sets: Open
// MPI's, PMI's, torchrun's (RANK and WORLD_SIZE), Slurm's, in this order.
struct Launch {
  std::string launcher;  // mpirun, mpiexec, torchrun or srun; "": alone, or as the only rank
  int rank = 0, ranks = 1;
  bool mpi = false;  // the ranks meet by MPI; else by TCP
};
Launch LaunchOfThisProcess();
// Whether Open MPI's mpirun started this process, as one of several or alone: its standard output
// is then a terminal of mpirun's own making, whatever mpirun's is.
bool StartedByMpirun();

// The MPI that this build uses: "Open MPI v4.1.4". Any time, any thread.
std::string MpiLibrary();

// The world that this process was started into: where a launcher started several ranks they meet,
// by MPI or TCP; else a single rank. Fatal paths end all ranks from here on. Call once; the world
// ends with the object (which waits for the other ranks). `argv` as main has it. kConfig, with a
// message on the first rank only, when the launcher is not that of this MPI: every process would be
// a rank 0 of its own. Errors of meeting by TCP (tcp.h) are each rank's own.
absl::StatusOr<std::unique_ptr<World>> StartWorld(int* argc, char*** argv);

// OK when all ranks pass OK. Otherwise an error on every rank, with the exit code of the first rank
// that has one; its message holds every rank's sentences once, each with the rank where not all say
// it, on the first rank, and is empty on the others: so the job prints it once.
absl::Status Agree(World* world, const absl::Status& status);
// Whether an error is Agree's: then all ranks end with it by themselves.
bool IsAgreed(const absl::Status& status);
// The first rank's status on every rank, as Agree gives it; what the others pass is ignored. For
// what the first rank does alone.
absl::Status StatusOfFirst(World* world, const absl::Status& status);

}  // namespace krait

#endif  // KRAIT_PARALLEL_WORLD_H_
