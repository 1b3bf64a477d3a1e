// The process mesh: pipeline x data x context x tensor, tensor fastest. One rank today; every size
// and coordinate exists from the start.
#ifndef KRAIT_PARALLEL_MESH_H_
#define KRAIT_PARALLEL_MESH_H_

#include <cstdint>

namespace krait {

struct Mesh {
  int pipeline = 1, data = 1, context = 1, tensor = 1;  // sizes
  int expert = 1;  // an expert group is this many consecutive ranks of a stage
  int rank = 0;

  int world() const { return pipeline * data * context * tensor; }
  int tensor_index() const { return rank % tensor; }
  int context_index() const { return rank / tensor % context; }
  int data_index() const { return rank / (tensor * context) % data; }
  int pipeline_index() const { return rank / (tensor * context * data); }
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_MESH_H_
