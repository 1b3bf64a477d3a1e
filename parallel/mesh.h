// The process mesh: pipeline x data x context x tensor, tensor fastest. An expert group is `expert`
// consecutive ranks of a stage, so experts fold over the tensor, context and data ranks.
#ifndef KRAIT_PARALLEL_MESH_H_
#define KRAIT_PARALLEL_MESH_H_

#include <vector>

namespace krait {

// A mesh as one of its ranks sees it.
struct Mesh {
  int pipeline = 1, data = 1, context = 1, tensor = 1;  // sizes
  int expert = 1;                                       // divides the stage
  int rank = 0;                                         // in [0, world)

  int stage() const { return data * context * tensor; }  // ranks of one pipeline stage
  int world() const { return pipeline * stage(); }
  int tensor_index() const { return rank % tensor; }
  int context_index() const { return rank / tensor % context; }
  int data_index() const { return rank / (tensor * context) % data; }
  int pipeline_index() const { return rank / stage(); }
  int expert_index() const { return rank % stage() % expert; }  // place in the expert group

  // The ranks of this rank's stage, ascending, whose tensor index falls into the same run of
  // `sharers` consecutive ones as this rank's: 1 gives the data and context ranks of one tensor
  // index, `tensor` the whole stage. `sharers` divides `tensor`.
  std::vector<int> TensorReplicas(int sharers) const;
  // The ranks that share this rank's passes, and those of its expert group, ascending.
  std::vector<int> TensorGroup() const;
  std::vector<int> ExpertGroup() const;
  // The ranks of this rank's stage, ascending, at its place in their expert groups.
  std::vector<int> ExpertReplicas() const;
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_MESH_H_
