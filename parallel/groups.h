// The communicators of one rank: where model and trainer get them.
#ifndef KRAIT_PARALLEL_GROUPS_H_
#define KRAIT_PARALLEL_GROUPS_H_

#include <memory>

#include "parallel/collectives.h"
#include "parallel/mesh.h"

namespace krait {

struct Groups {
  Mesh mesh;
  std::unique_ptr<Communicator> tensor;  // the ranks that share a pass
  std::unique_ptr<Communicator> stage;   // all ranks of the pipeline stage
};

// Those of a single rank.
Groups MakeOneRankGroups();

}  // namespace krait

#endif  // KRAIT_PARALLEL_GROUPS_H_
