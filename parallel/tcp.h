// Ranks that meet by TCP, where none of MPI's launchers started them: host control alone, as a star
// around rank 0. Tensors of GPUs travel by NCCL beside it; those of CPU ranks cannot.
//
// Meeting: rank 0 listens at an address that all know; every other rank calls twice, for messages
// and for the watch over its life, says who it is and is welcomed; when all are there rank 0 lets
// them go. Ranks may start in any order, and late. Who does not say hello as a rank of this job is
// no part of it: strangers are dropped, ranks of other jobs are told so.
//
// Life: a thread of each rank watches. A connection that closes before the end is a rank's death:
// all others end with kCollective. A rank that ends all (World::Abort) sends them its exit code.
// Nothing is encrypted, and who can read the command line of a rank could pass for one while they
// meet: it is for networks that are the cluster's own, as NCCL is.
#ifndef KRAIT_PARALLEL_TCP_H_
#define KRAIT_PARALLEL_TCP_H_

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/base/status.h"
#include "parallel/world.h"

namespace krait {

struct TcpJob {
  int rank = 0, ranks = 1;
  std::string address;  // of rank 0: a name or a number
  int port = 0;
  int local_rank = -1, local_size = -1;  // -1: by the names of the machines
  uint64_t key = 0;                      // the same on all ranks of a job
  double start_seconds = 300;            // in which all ranks are there
};

// By the variables of the launcher: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and where they are
// set LOCAL_RANK and LOCAL_WORLD_SIZE; or Slurm's, of which the first node and a port by the number
// of the job stand for the address unless MASTER_ADDR and MASTER_PORT are given. Where torchrun's
// agent listens at MASTER_PORT itself, it is the port behind. kConfig for what is missing or no
// number.
absl::StatusOr<TcpJob> TcpJobOfThisProcess(const Launch& launch, int argc, const char* const* argv);

// The first name of a Slurm list of nodes: "gpu03" of "gpu[03-05,9],cpu1".
std::string FirstNode(const std::string& list);

// Meets the other ranks; once per process. kCollective when not all are there in time, or one died
// meanwhile; kConfig when the port is taken, or rank 0 is another job's.
absl::StatusOr<std::unique_ptr<World>> StartTcpWorld(const TcpJob& job);

}  // namespace krait

#endif  // KRAIT_PARALLEL_TCP_H_
