// MPI, of which nothing else in the project knows.
#ifndef KRAIT_PARALLEL_MPI_H_
#define KRAIT_PARALLEL_MPI_H_

#include <memory>

#include "parallel/world.h"

namespace krait {

// Whether a launcher (mpirun, mpiexec, srun) started this process as one of several ranks, by the
// variables that it sets.
bool StartedByMpi();

// Initialises MPI; once per process, and only under a launcher.
std::unique_ptr<World> StartMpiWorld(int* argc, char*** argv);

}  // namespace krait

#endif  // KRAIT_PARALLEL_MPI_H_
