// The rates of the dense and grouped products on the GPU at the shapes of a training step, in
// TFLOP/s, hot: each figure is the median of calls that follow 0.15 s of the same call, after 2 s
// of load. bf16, random values; weight gradients in f32.
//
//   build/cuda/tests/bench_gemm_gpu_bench [dense|grouped] [NAME]     NAME: rows that begin so
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/random.h"
#include "kernels/cuda/runtime.h"
#include "kernels/gemm.h"

namespace krait {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point since) {
  return std::chrono::duration<double>(Clock::now() - since).count();
}

// The median over rounds of the time of one call, from rounds of calls that take some 10 ms
// together.
double Milliseconds(double flops, const std::function<void(int)>& call, double warm_up = 0.15) {
  const int calls = std::max(1, static_cast<int>(10e-3 / (flops / 600e12 + 5e-6)));
  for (const auto start = Clock::now(); Seconds(start) < warm_up;) {
    for (int i = 0; i < calls; ++i) call(i);
    cuda::Synchronize();
  }
  std::vector<double> rounds;
  for (int round = 0; round < 11; ++round) {
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i) call(i);
    cuda::Synchronize();
    rounds.push_back(Seconds(start) * 1e3 / calls);
  }
  std::nth_element(rounds.begin(), rounds.begin() + 5, rounds.end());
  return rounds[5];
}

constexpr int kSets = 2;  // operands used in turn, so that no call finds its own in the cache

class Bench {
 public:
  explicit Bench(const std::string& only)
      : only_(only),
        memory_("operands", Device::kCuda, int64_t{40} << 30),
        scratch_("scratch", Device::kCuda, int64_t{64} << 20) {
    ctx_.device = Device::kCuda;
    ctx_.scratch = &scratch_;
    const RandomStream random(1, RandomPurpose::kSynthetic, 0);
    host_.resize(1'000'003);
    for (size_t i = 0; i < host_.size(); ++i) {
      const auto value = static_cast<float>(random.Normal(i));
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      host_[i] = static_cast<uint16_t>(bits >> 16);
    }
    const Tensor a = Random({8192, 8192}), c = memory_.Alloc(DType::kBF16, {8192, 8192});
    Milliseconds(
        0x1p40, [&](int) { MatMul(c, a, false, a, true, false, ctx_); }, 2);
    memory_.Release(0);
  }

  // x [M,I], w [O,I].
  void Dense(const char* name, int64_t m, int64_t inputs, int64_t outputs, DType forward,
             DType backward) {
    if (!std::string(name).starts_with(only_)) return;
    const ArenaScope scope(&memory_);
    Tensor x[kSets], w[kSets], dy[kSets];
    for (int s = 0; s < kSets; ++s) {
      x[s] = Random({m, inputs}), w[s] = Random({outputs, inputs}), dy[s] = Random({m, outputs});
    }
    const Tensor y = memory_.Alloc(forward, {m, outputs}),
                 dx = memory_.Alloc(backward, {m, inputs});
    const Tensor dw = memory_.Alloc(DType::kF32, {outputs, inputs});
    Report(name, m, inputs, outputs,
           {[&](int i) { LinearForward(y, x[i % kSets], w[i % kSets], Tensor(), ctx_); },
            [&](int i) { LinearBackwardInput(dx, dy[i % kSets], w[i % kSets], false, ctx_); },
            [&](int i) { LinearBackwardWeight(dw, dy[i % kSets], x[i % kSets], false, ctx_); },
            [&](int i) { LinearBackwardWeight(dw, dy[i % kSets], x[i % kSets], true, ctx_); }});
  }

  // The experts' layer with routing as uneven as a trained router's; pad rows are not counted.
  void Experts(const char* name, int64_t experts, int64_t m, int64_t inputs, int64_t outputs) {
    if (!std::string(name).starts_with(only_)) return;
    const ArenaScope scope(&memory_);
    std::vector<double> share(static_cast<size_t>(experts));
    double total = 0;
    for (size_t e = 0; e < share.size(); ++e) {
      total += share[e] = 1 + 0.35 * std::sin(2.3 * static_cast<double>(e) + 1);
    }
    std::vector<int64_t> offsets = {0}, rows;
    int64_t left = m;
    const int64_t align = ExpertRowAlignment(Device::kCuda);
    for (int64_t e = 0; e < experts; ++e) {
      const auto part =
          static_cast<int64_t>(static_cast<double>(m) * share[static_cast<size_t>(e)] / total);
      rows.push_back(e + 1 < experts ? part : left);
      left -= rows.back();
      offsets.push_back(offsets.back() + (rows.back() + align - 1) / align * align);
    }
    const int64_t used = offsets.back();
    const Tensor device_offsets = memory_.Alloc(DType::kI64, {experts + 1});
    cuda::CopyToDevice(device_offsets.raw(), offsets.data(), 8 * (experts + 1));
    Tensor x[kSets], w[kSets], dy[kSets];
    for (int s = 0; s < kSets; ++s) {
      x[s] = Random({used, inputs}), dy[s] = Random({used, outputs});
      w[s] = Random({experts * outputs, inputs}).View({experts, outputs, inputs});
      for (const Tensor& t : {x[s], dy[s]}) {
        const std::vector<uint16_t> zeros(static_cast<size_t>(align * t.dim(1)));
        for (int64_t e = 0; e < experts; ++e) {
          const int64_t begin = offsets[static_cast<size_t>(e)] + rows[static_cast<size_t>(e)];
          const Tensor pad = t.Slice(0, begin, offsets[static_cast<size_t>(e + 1)] - begin);
          if (pad.numel() > 0) cuda::CopyToDevice(pad.raw(), zeros.data(), pad.bytes());
        }
      }
    }
    const Tensor y = memory_.Alloc(DType::kBF16, {used, outputs});
    const Tensor dx = memory_.Alloc(DType::kBF16, {used, inputs});
    const Tensor dw = memory_.Alloc(DType::kF32, {experts, outputs, inputs});
    const Tensor& o = device_offsets;
    const auto weight = [&](int i, bool add) {
      GroupedLinearBackwardWeight(dw, dy[i % kSets], x[i % kSets], o, add, ctx_);
    };
    Report(name, m, inputs, outputs,
           {[&](int i) { GroupedLinearForward(y, x[i % kSets], w[i % kSets], o, ctx_); },
            [&](int i) { GroupedLinearBackwardInput(dx, dy[i % kSets], w[i % kSets], o, ctx_); },
            [&](int i) { weight(i, false); }, [&](int i) { weight(i, true); }});

    // For comparison a dense product for each expert, which needs the sizes on the host.
    const auto each = [&](const auto& product) {
      for (int64_t e = 0; e < experts; ++e) {
        const int64_t begin = offsets[static_cast<size_t>(e)];
        const int64_t count = offsets[static_cast<size_t>(e + 1)] - begin;
        product([&](Tensor t) { return t.Slice(0, begin, count); },
                [&](Tensor t) {
                  return t.Slice(0, e, 1).View({outputs, inputs});
                });
      }
    };
    const auto weights = [&](int i, bool add) {
      each([&](const auto& rows_of, const auto& expert_of) {
        LinearBackwardWeight(expert_of(dw), rows_of(dy[i % kSets]), rows_of(x[i % kSets]), add,
                             ctx_);
      });
    };
    Report("  a product for each", m, inputs, outputs,
           {[&](int i) {
              each([&](const auto& rows_of, const auto& expert_of) {
                LinearForward(rows_of(y), rows_of(x[i % kSets]), expert_of(w[i % kSets]), Tensor(),
                              ctx_);
              });
            },
            [&](int i) {
              each([&](const auto& rows_of, const auto& expert_of) {
                LinearBackwardInput(rows_of(dx), rows_of(dy[i % kSets]), expert_of(w[i % kSets]),
                                    false, ctx_);
              });
            },
            [&](int i) { weights(i, false); }, [&](int i) { weights(i, true); }});
  }

 private:
  Tensor Random(std::initializer_list<int64_t> shape) {
    const Tensor t = memory_.Alloc(DType::kBF16, shape);
    const int64_t period = static_cast<int64_t>(host_.size());
    const int64_t first = std::min(period, t.numel());
    cuda::CopyToDevice(t.raw(), host_.data(), first * 2);
    // The rest are copies of what is there, twice as much each time.
    for (int64_t done = first; done < t.numel();) {
      const int64_t count = std::min(done, t.numel() - done);
      cuda::CopyOnDevice(static_cast<char*>(t.raw()) + done * 2, t.raw(), count * 2, ctx_.stream);
      done += count;
    }
    return t;
  }

  void Report(const char* name, int64_t m, int64_t inputs, int64_t outputs,
              const std::vector<std::function<void(int)>>& calls) {
    const double flops =
        2.0 * static_cast<double>(m) * static_cast<double>(inputs) * static_cast<double>(outputs);
    std::printf("%-22s %6ld %6ld %6ld ", name, static_cast<long>(m), static_cast<long>(inputs),
                static_cast<long>(outputs));
    for (const auto& call : calls) {
      const double ms = Milliseconds(flops, call);
      std::printf("  %5.0f (%.3f ms)", flops / ms * 1e-9, ms);
    }
    std::printf("\n");
    std::fflush(stdout);
  }

  const std::string only_;
  Arena memory_, scratch_;
  Context ctx_;
  std::vector<uint16_t> host_;
};

int Main(const std::string& kind, const std::string& only) {
  std::string reason;
  if (!cuda::Available(&reason)) {
    std::printf("no GPU: %s\n", reason.c_str());
    return 1;
  }
  Bench bench(only);
  std::printf(
      "%-22s %6s %6s %6s   TFLOP/s (time): forward, backward, weight gradient "
      "overwriting, adding\n",
      "", "M", "I", "O");
  constexpr DType kBF16 = DType::kBF16, kF32 = DType::kF32;
  if (kind != "grouped") {
    struct Layer {
      const char* name;
      int64_t m, inputs, outputs;
      DType forward = kBF16, backward = kBF16;
    };
    for (const Layer& l : {Layer{"3b in_proj", 16384, 2048, 8192},
                           Layer{"3b out_proj", 16384, 4096, 2048},
                           Layer{"3b gate_up", 16384, 2048, 11264},
                           Layer{"3b down", 16384, 5632, 2048},
                           Layer{"3b qkv", 16384, 2048, 3072},
                           Layer{"3b o", 16384, 2048, 2048},
                           Layer{"3b x_proj", 16384, 4096, 160, kF32},
                           Layer{"3b dt_proj", 16384, 128, 4096, kBF16, kF32},
                           Layer{"3b head, chunk 2048", 2048, 2048, 65536},
                           Layer{"3b head, chunk 4096", 4096, 2048, 65536},
                           Layer{"block in_proj", 8192, 4096, 16384},
                           Layer{"block out_proj", 8192, 8192, 4096},
                           Layer{"block gate_up", 8192, 4096, 28672},
                           Layer{"block down", 8192, 14336, 4096},
                           Layer{"block in_proj", 16384, 4096, 16384},
                           Layer{"block out_proj", 16384, 8192, 4096},
                           Layer{"block gate_up", 16384, 4096, 28672},
                           Layer{"block down", 16384, 14336, 4096},
                           Layer{"block qkv", 16384, 4096, 6144},
                           Layer{"block x_proj", 16384, 8192, 288, kF32},
                           Layer{"block dt_proj", 16384, 256, 8192, kBF16, kF32},
                           Layer{"block head, chunk 4096", 4096, 4096, 65536}}) {
      bench.Dense(l.name, l.m, l.inputs, l.outputs, l.forward, l.backward);
    }
  }
  if (kind != "dense") {
    bench.Experts("3b experts gate_up", 8, 16384, 2048, 11264);
    bench.Experts("3b experts down", 8, 16384, 5632, 2048);
    bench.Experts("3b experts gate_up", 8, 32768, 2048, 11264);
    bench.Experts("3b experts down", 8, 32768, 5632, 2048);
    bench.Experts("block experts gate_up", 4, 16384, 4096, 28672);
    bench.Experts("block experts down", 4, 16384, 14336, 4096);
    bench.Experts("block experts gate_up", 4, 32768, 4096, 28672);
    bench.Experts("block experts down", 4, 32768, 14336, 4096);
    bench.Experts("8 experts gate_up", 8, 32768, 4096, 28672);
    bench.Experts("8 experts down", 8, 32768, 14336, 4096);
    bench.Experts("16 experts 4096x14336", 16, 32768, 4096, 14336);
    bench.Experts("16 experts 14336x4096", 16, 32768, 14336, 4096);
  }
  return 0;
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) {
  return krait::Main(argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "");
}
