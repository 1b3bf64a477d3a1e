// MPI, of which nothing else in the project knows.
#ifndef KRAIT_PARALLEL_MPI_H_
#define KRAIT_PARALLEL_MPI_H_

#include <memory>

#include "parallel/world.h"

namespace krait {

// Initialises MPI; once per process, and only under a launcher.
std::unique_ptr<World> StartMpiWorld(int* argc, char*** argv);

}  // namespace krait

#endif  // KRAIT_PARALLEL_MPI_H_
