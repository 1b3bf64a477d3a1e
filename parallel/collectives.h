// Collective operations over the ranks of one mesh axis. They take tensor views, never raw counts.
//
// One thread per rank issues all collectives, in the same program order on every rank. Operations
// are in place or out of place as named, complete on return for CPU tensors and are enqueued on
// ctx.stream for CUDA tensors. Failures end all ranks through Fatal(kCollective).
#ifndef KRAIT_PARALLEL_COLLECTIVES_H_
#define KRAIT_PARALLEL_COLLECTIVES_H_

#include <cstdint>
#include <memory>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  virtual void AllReduceSum(Tensor x, const Context& ctx) = 0;
  virtual void AllReduceMax(Tensor x, const Context& ctx) = 0;
  // out [size * n] = concatenation of every rank's in [n] along dimension 0.
  virtual void AllGather(Tensor out, Tensor in, const Context& ctx) = 0;
  // out [n] = this rank's part of the sum of every rank's in [size * n].
  virtual void ReduceScatterSum(Tensor out, Tensor in, const Context& ctx) = 0;
  // Rows of `in` [rows,D] travel to ranks by send_rows[size]; out holds recv_rows[size] rows in
  // rank order. Host memory counts.
  virtual void AllToAllRows(Tensor out, const int64_t* recv_rows, Tensor in,
                            const int64_t* send_rows, const Context& ctx) = 0;
  virtual void Broadcast(Tensor x, int root, const Context& ctx) = 0;
  virtual void Barrier() = 0;
};

// The communicator of a single rank: reductions leave the data as it is, gathers copy.
std::unique_ptr<Communicator> MakeOneRankCommunicator();

}  // namespace krait

#endif  // KRAIT_PARALLEL_COLLECTIVES_H_
