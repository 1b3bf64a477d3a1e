#include "parallel/collectives.h"

#include "kernels/activation.h"

namespace krait {
namespace {

class OneRankCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void AllReduceSum(Tensor /*x*/, const Context& /*ctx*/) override {}
  void AllReduceMax(Tensor /*x*/, const Context& /*ctx*/) override {}
  void AllGather(Tensor out, Tensor in, const Context& ctx) override { CopyIfApart(out, in, ctx); }
  void ReduceScatterSum(Tensor out, Tensor in, const Context& ctx) override {
    CopyIfApart(out, in, ctx);
  }
  void AllToAllRows(Tensor out, const int64_t* recv_rows, Tensor in, const int64_t* send_rows,
                    const Context& ctx) override {
    KRAIT_CHECK(recv_rows[0] == send_rows[0]);
    CopyIfApart(out, in, ctx);
  }
  void Broadcast(Tensor /*x*/, int root, const Context& /*ctx*/) override {
    KRAIT_CHECK(root == 0);
  }
  void Barrier() override {}

 private:
  static void CopyIfApart(Tensor out, Tensor in, const Context& ctx) {
    KRAIT_CHECK(out.numel() == in.numel());
    if (out.raw() != in.raw()) Copy(out, in, ctx);
  }
};

}  // namespace

std::unique_ptr<Communicator> MakeOneRankCommunicator() {
  return std::make_unique<OneRankCommunicator>();
}

}  // namespace krait
