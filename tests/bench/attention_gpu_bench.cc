// The rates of attention on the GPU: TFLOP/s that a causal pass needs (4 P per query and visible
// key forward, 10 P backward; documents counted as if there were none), and GB/s of keys and values
// in decoding. q, k and v are slices of one glued product; documents have 1024 tokens.
//
//   build/cuda/tests/bench_attention_gpu_bench [NAME]      only lines whose name contains NAME
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/runtime.h"
#include "kernels/random_fill.h"

namespace krait {
namespace {

// Sets of operands, used in turn, so that no call finds its operands in the cache.
constexpr int kSets = 2;

class Bench {
 public:
  explicit Bench(std::string only) : only_(std::move(only)) {
    ctx_.device = Device::kCuda;
    ctx_.scratch = &scratch_;
    begin_ = cuda::CreateEvent(/*timed=*/true);
    end_ = cuda::CreateEvent(/*timed=*/true);
  }

  void Run() {
    for (const auto& [b, t, h, g] : {Sizes{1, 4096, 16, 4},
                                     {2, 4096, 16, 4},
                                     {4, 4096, 16, 4},
                                     {1, 4096, 32, 8},
                                     {2, 4096, 32, 8},
                                     {4, 4096, 32, 8},
                                     {1, 8192, 32, 8},
                                     {1, 16384, 32, 8},
                                     {1, 32768, 16, 4},
                                     {1, 65536, 16, 4}}) {
      Training(b, t, h, g, 128, DType::kBF16);
    }
    Training(1, 2048, 16, 4, 64, DType::kBF16);
    Training(1, 2048, 8, 2, 256, DType::kBF16);
    Training(1, 2048, 16, 4, 128, DType::kF32);
    for (const auto& [b, s, h, g] :
         {Sizes{1, 4096, 32, 8}, {1, 32768, 32, 8}, {1, 131072, 16, 4}, {16, 8192, 32, 8}}) {
      Decoding(b, s, h, g, 128);
    }
    Rotation(4, 4096, 32, 128);
  }

 private:
  struct Sizes {
    int64_t b, t, h, g;
  };

  Tensor Normal(std::initializer_list<int64_t> shape, DType dtype = DType::kBF16) {
    const Tensor t = memory_.Alloc(dtype, shape);
    FillNormal(t, RandomStream(1, RandomPurpose::kSynthetic, seed_++), 0, t.dim(-1), 1, ctx_);
    return t;
  }

  // The median over 9 rounds of the time of one call, from rounds of 3 calls.
  double Milliseconds(const std::function<void(int)>& call) {
    std::vector<double> rounds;
    for (int round = 0; round < 11; ++round) {
      cuda::RecordEvent(begin_, ctx_.stream);
      for (int i = 0; i < 3; ++i) call(i % kSets);
      cuda::RecordEvent(end_, ctx_.stream);
      cuda::SynchronizeStream(ctx_.stream);
      const double ms = cuda::SecondsBetween(begin_, end_) * 1000 / 3;
      if (round == 1 && ms > 20) return ms;
      if (round >= 2) rounds.push_back(ms);
    }
    std::nth_element(rounds.begin(), rounds.begin() + 4, rounds.end());
    return rounds[4];
  }

  void Report(const std::string& name, double count, const char* unit,
              const std::function<void(int)>& call) {
    if (name.find(only_) == std::string::npos) return;
    const double ms = Milliseconds(call);
    std::printf("%-64s %9.4f ms %7.0f %s\n", name.c_str(), ms, count / ms * 1e-6, unit);
    std::fflush(stdout);
  }

  void Training(int64_t b, int64_t t, int64_t h, int64_t g, int64_t p, DType dtype) {
    const ArenaScope scope(&memory_);
    struct Operands {
      Tensor q, k, v, y, lse, dq, dk, dv, dy;
    } sets[kSets];
    const auto split = [&](Tensor* q, Tensor* k, Tensor* v) {
      const Tensor all = Normal({b, t, h + 2 * g, p}, dtype);
      *q = all.Slice(2, 0, h), *k = all.Slice(2, h, g), *v = all.Slice(2, h + g, g);
    };
    for (Operands& o : sets) {
      split(&o.q, &o.k, &o.v), split(&o.dq, &o.dk, &o.dv);
      o.y = Normal({b, t, h, p}, dtype), o.dy = Normal({b, t, h, p}, dtype);
      o.lse = Normal({b, h, t}, DType::kF32);
    }
    std::vector<int32_t> starts(static_cast<size_t>(b * t));
    for (int64_t i = 0; i < b * t; ++i) starts[i] = static_cast<int32_t>(i % t / 1024 * 1024);
    const Tensor doc_start = memory_.Alloc(DType::kI32, {b, t});
    cuda::CopyToDevice(doc_start.raw(), starts.data(), doc_start.bytes(), ctx_.stream);
    const std::string title = std::string(Name(dtype)) + ' ' + std::to_string(h) + '/' +
                              std::to_string(g) + " heads of " + std::to_string(p) + ", B " +
                              std::to_string(b) + " T " + std::to_string(t) + ", ";
    const double flops = static_cast<double>(2 * b * h * t * t * p) * 1e-3;  // of 1e3, for TFLOP/s
    for (const bool documents : {false, true}) {
      const Documents docs{documents ? doc_start : Tensor()};
      const std::string with = documents ? " documents" : "";
      const auto forward = [&](int s) {
        Operands& o = sets[s];
        AttentionForward(o.y, o.lse, o.q, o.k, o.v, docs, ctx_);
      };
      const auto backward = [&](int s) {
        Operands& o = sets[s];
        AttentionBackward(o.dq, o.dk, o.dv, o.dy, o.y, o.lse, o.q, o.k, o.v, docs, ctx_);
      };
      for (int s = 0; s < kSets; ++s) forward(s);
      Report(title + "forward" + with, flops, "TFLOP/s", forward);
      Report(title + "backward" + with, 2.5 * flops, "TFLOP/s", backward);
      ctx_.deterministic = false;
      Report(title + "backward not deterministic" + with, 2.5 * flops, "TFLOP/s", backward);
      ctx_.deterministic = true;
    }
  }

  void Decoding(int64_t b, int64_t s, int64_t h, int64_t g, int64_t p) {
    const ArenaScope scope(&memory_);
    Tensor q[kSets], k[kSets], v[kSets], y[kSets], lse[kSets];
    for (int i = 0; i < kSets; ++i) {
      q[i] = Normal({b, 1, h, p}), k[i] = Normal({b, s, g, p}), v[i] = Normal({b, s, g, p});
      y[i] = Normal({b, 1, h, p}), lse[i] = Normal({b, h, 1}, DType::kF32);
    }
    Report("decode, " + std::to_string(h) + '/' + std::to_string(g) + " heads, B " +
               std::to_string(b) + ", keys " + std::to_string(s),
           static_cast<double>(2 * k[0].bytes()), "GB/s", [&](int i) {
             AttentionForward(y[i], lse[i], q[i], k[i], v[i], {Tensor(), s - 1}, ctx_);
           });
  }

  void Rotation(int64_t b, int64_t t, int64_t h, int64_t p) {
    const ArenaScope scope(&memory_);
    Tensor x[kSets];
    for (Tensor& one : x) one = Normal({b, t, h, p});
    Report("rope, B " + std::to_string(b) + " T " + std::to_string(t),
           static_cast<double>(2 * x[0].bytes()), "GB/s",
           [&](int i) { Rope(x[i], {}, 1e4, false, ctx_); });
  }

  std::string only_;
  uint64_t seed_ = 0;
  Arena memory_{"operands", Device::kCuda, int64_t{8} << 30};
  Arena scratch_{"scratch", Device::kCuda, int64_t{5} << 30};
  Context ctx_;
  void *begin_, *end_;
};

}  // namespace
}  // namespace krait

int main(int argc, char** argv) {
  std::string reason;
  if (!krait::cuda::Available(&reason)) {
    std::printf("no GPU: %s\n", reason.c_str());
    return 1;
  }
  krait::Bench(argc > 1 ? argv[1] : "").Run();
  return 0;
}
