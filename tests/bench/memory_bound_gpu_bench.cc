// The rates of the memory-bound ops on the GPU beside that of a device copy of the same run, in
// bytes that must move (each operand counted once), bf16 unless said.
//
//   build/cuda/tests/bench_memory_bound_gpu_bench [NAME]      only lines whose name contains NAME
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/causal_conv1d.h"
#include "kernels/cuda/runtime.h"
#include "kernels/inner_norms.h"
#include "kernels/optimizer.h"
#include "kernels/random_fill.h"
#include "kernels/rms_norm.h"
#include "kernels/swiglu.h"

namespace krait {
namespace {

// Sets of operands, used in turn, so that no call finds its operands in the cache.
constexpr int kSets = 3;

class Bench {
 public:
  explicit Bench(std::string only) : only_(std::move(only)) {
    ctx_.device = Device::kCuda;
    ctx_.scratch = &scratch_;
    begin_ = cuda::CreateEvent(/*timed=*/true);
    end_ = cuda::CreateEvent(/*timed=*/true);
  }

  void Run() {
    for (const auto& [rows, cols] :
         {std::pair<int64_t, int64_t>{16384, 4096}, {16384, 8192}, {16384, 2048}, {65536, 256}}) {
      Norms(rows, cols);
    }
    Section("B 4, T 4096, I 8192, K 4", int64_t{4} * 4096 * 8192 * 2), Conv(4, 4096, 8192);
    Section("B 4, T 4096, I 4096, K 4", int64_t{4} * 4096 * 4096 * 2), Conv(4, 4096, 4096);
    Section("B 2, T 4096, I 4096, K 4", int64_t{2} * 4096 * 4096 * 2), Conv(2, 4096, 4096);
    Section("M 16384, F 14336", int64_t{16384} * 14336 * 2), SwiGlu(16384, 14336);
    Section("M 16384, F 5632", int64_t{16384} * 5632 * 2), SwiGlu(16384, 5632);
    Section("M 16384, R 256, N 16", int64_t{16384} * 288 * 4), InnerNorms(16384, 256, 16);
    Section("M 16384, R 128, N 16", int64_t{16384} * 160 * 4), InnerNorms(16384, 128, 16);
    Section("n 2^27", int64_t{1} << 29), Optimizer(int64_t{1} << 27);
    Section("M 16384, D 4096", int64_t{16384} * 4096 * 2), Elementwise(16384, 4096);
  }

 private:
  // Prints a title and measures the copy of `bytes` that the lines below it are compared with.
  void Section(const std::string& title, int64_t bytes) {
    title_ = title, copy_bytes_ = bytes, copy_rate_ = 0;
  }

  Tensor Normal(std::initializer_list<int64_t> shape, DType dtype = DType::kBF16,
                double scale = 1) {
    const Tensor t = memory_.Alloc(dtype, shape);
    const RandomStream random(1, RandomPurpose::kSynthetic, seed_++);
    FillNormal(t, random, 0, t.dim(-1), scale, ctx_);
    return t;
  }

  // The median over 15 rounds of the time of one call, from rounds of 10 calls.
  double Milliseconds(const std::function<void(int)>& call) {
    std::vector<double> rounds;
    for (int round = 0; round < 18; ++round) {
      cuda::RecordEvent(begin_, ctx_.stream);
      for (int i = 0; i < 10; ++i) call(i % kSets);
      cuda::RecordEvent(end_, ctx_.stream);
      cuda::SynchronizeStream(ctx_.stream);
      if (round >= 3) rounds.push_back(cuda::SecondsBetween(begin_, end_) * 100);  // after warm-up
    }
    std::nth_element(rounds.begin(), rounds.begin() + 7, rounds.end());
    return rounds[7];
  }

  void Report(const std::string& name, int64_t moved, const std::function<void(int)>& call) {
    if (name.find(only_) == std::string::npos) return;
    if (copy_rate_ == 0) {
      const ArenaScope scope(&memory_);
      Tensor from[kSets], to[kSets];
      for (int s = 0; s < kSets; ++s) {
        from[s] = Normal({copy_bytes_ / 2}), to[s] = Normal({copy_bytes_ / 2});
      }
      const double ms = Milliseconds(
          [&](int s) { cuda::CopyOnDevice(to[s].raw(), from[s].raw(), copy_bytes_, ctx_.stream); });
      copy_rate_ = static_cast<double>(2 * copy_bytes_) / ms * 1e-6;
      std::printf("%s\n  %-27s %8.4f ms %6.0f GB/s\n", title_.c_str(), "device copy", ms,
                  copy_rate_);
    }
    const double ms = Milliseconds(call);
    const double rate = static_cast<double>(moved) / ms * 1e-6;
    std::printf("  %-27s %8.4f ms %6.0f GB/s %6.1f %% of the copy\n", name.c_str(), ms, rate,
                100 * rate / copy_rate_);
    std::fflush(stdout);
  }

  void Norms(int64_t rows, int64_t cols) {
    const ArenaScope scope(&memory_);
    const int64_t bytes = rows * cols * 2, stats = rows * 4;
    Section("M " + std::to_string(rows) + ", D " + std::to_string(cols), bytes);
    const Tensor w = Normal({cols}, DType::kF32), dw = Normal({cols}, DType::kF32);
    Tensor a[kSets], b[kSets], c[kSets], d[kSets], rstd[kSets];
    for (int s = 0; s < kSets; ++s) {
      for (Tensor* t : {&a[s], &b[s], &c[s], &d[s]}) *t = Normal({rows, cols});
      rstd[s] = memory_.Alloc(DType::kF32, {rows});
    }
    Report("RmsNorm forward", 2 * bytes + stats,
           [&](int s) { RmsNormForward(b[s], rstd[s], a[s], w, 1e-6, ctx_); });
    Report("RmsNorm backward", 3 * bytes + stats,
           [&](int s) { RmsNormBackward(c[s], dw, b[s], a[s], rstd[s], w, false, ctx_); });
    Report("residual RmsNorm forward", 4 * bytes + stats,
           [&](int s) { ResidualRmsNormForward(c[s], d[s], rstd[s], a[s], b[s], w, 1e-6, ctx_); });
    Report("residual RmsNorm backward", 4 * bytes + stats,
           [&](int s) { ResidualRmsNormBackward(d[s], dw, b[s], c[s], a[s], rstd[s], w, ctx_); });
  }

  // x and dx are the first halves of in_proj's output and of its gradient.
  void Conv(int64_t batch, int64_t time, int64_t channels) {
    const ArenaScope scope(&memory_);
    const int64_t bytes = batch * time * channels * 2;
    const Tensor w = Normal({channels, 4}), bias = Normal({channels});
    const Tensor dw = Normal({channels, 4}, DType::kF32), dbias = Normal({channels}, DType::kF32);
    Tensor x[kSets], y[kSets], dx[kSets], dy[kSets];
    for (int s = 0; s < kSets; ++s) {
      for (Tensor* t : {&x[s], &dx[s]}) {
        *t = Normal({batch, time, 2 * channels}).Slice(2, 0, channels);
      }
      for (Tensor* t : {&y[s], &dy[s]}) *t = Normal({batch, time, channels});
    }
    // Documents of 1000 tokens.
    const Tensor starts = memory_.Alloc(DType::kI32, {batch, time});
    std::vector<int32_t> positions(static_cast<size_t>(batch * time));
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto t = static_cast<int32_t>(i % static_cast<size_t>(time));
      positions[i] = t / 1000 * 1000;
    }
    cuda::CopyToDevice(starts.raw(), positions.data(), starts.bytes(), ctx_.stream);
    const Documents documents{starts, 0};
    Report("conv1d forward, documents", 2 * bytes, [&](int s) {
      CausalConv1dSiluForward(y[s], Tensor(), x[s], w, bias, Tensor(), documents, ctx_);
    });
    Report("conv1d backward, documents", 3 * bytes, [&](int s) {
      CausalConv1dSiluBackward(dx[s], dw, dbias, Tensor(), dy[s], Tensor(), x[s], w, bias, Tensor(),
                               documents, ctx_);
    });
    Report("conv1d forward", 2 * bytes, [&](int s) {
      CausalConv1dSiluForward(y[s], Tensor(), x[s], w, bias, Tensor(), {}, ctx_);
    });
    Report("conv1d backward", 3 * bytes, [&](int s) {
      CausalConv1dSiluBackward(dx[s], dw, dbias, Tensor(), dy[s], Tensor(), x[s], w, bias, Tensor(),
                               {}, ctx_);
    });
  }

  void SwiGlu(int64_t rows, int64_t f) {
    const ArenaScope scope(&memory_);
    const int64_t bytes = rows * f * 2;
    const Tensor weight = Normal({rows}, DType::kF32), d_weight = Normal({rows}, DType::kF32);
    const Tensor source = memory_.Alloc(DType::kI32, {rows});
    std::vector<int32_t> order(static_cast<size_t>(rows));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    cuda::CopyToDevice(source.raw(), order.data(), rows * 4, ctx_.stream);
    Tensor in[kSets], product[kSets], d_in[kSets], d_product[kSets];
    for (int s = 0; s < kSets; ++s) {
      for (Tensor* t : {&in[s], &d_in[s]}) *t = Normal({rows, 2 * f});
      for (Tensor* t : {&product[s], &d_product[s]}) *t = Normal({rows, f});
    }
    Report("SwiGLU forward", 3 * bytes, [&](int s) { SwiGluForward(product[s], in[s], ctx_); });
    Report("SwiGLU backward", 5 * bytes,
           [&](int s) { SwiGluBackward(d_in[s], Tensor(), d_product[s], in[s], ctx_); });
    Report("SwiGLU backward, product", 6 * bytes,
           [&](int s) { SwiGluBackward(d_in[s], product[s], d_product[s], in[s], ctx_); });
    Report("SwiGLU backward, weighted", 6 * bytes, [&](int s) {
      WeightedSwiGluBackward(d_in[s], product[s], {weight, d_weight, source}, d_product[s], in[s],
                             ctx_);
    });
  }

  void InnerNorms(int64_t rows, int64_t r, int64_t n) {
    const ArenaScope scope(&memory_);
    const int64_t cols = r + 2 * n;
    const Tensor vectors = Normal({2 * cols}, DType::kF32);
    const auto parts = [&](int64_t at) {
      return InnerNormWeights{vectors.Slice(0, at, r), vectors.Slice(0, at + r, n),
                              vectors.Slice(0, at + r + n, n)};
    };
    const InnerNormWeights w = parts(0), dw = parts(cols);
    Tensor projected[kSets], normed[kSets], d_normed[kSets], rstd[kSets];
    for (int s = 0; s < kSets; ++s) {
      for (Tensor* t : {&projected[s], &d_normed[s]}) *t = Normal({rows, cols}, DType::kF32);
      normed[s] = Normal({rows, cols}), rstd[s] = Normal({3, rows}, DType::kF32);
    }
    Report("inner norms forward", rows * (cols * 6 + 12),
           [&](int s) { InnerNormsForward(normed[s], rstd[s], projected[s], w, 1e-6, ctx_); });
    Report("inner norms backward", rows * (cols * 10 + 12), [&](int s) {
      InnerNormsBackward(normed[s], dw, d_normed[s], projected[s], rstd[s], w, ctx_);
    });
  }

  void Optimizer(int64_t n) {
    const ArenaScope scope(&memory_);
    const Tensor master = Normal({n}, DType::kF32), grad = Normal({n}, DType::kF32);
    const Tensor m = Normal({n}, DType::kF32), v = Normal({n}, DType::kF32);
    const Tensor weight = Normal({n}), m16 = Normal({n}), v16 = Normal({n});
    Fill(v, 1, ctx_), Fill(v16, 1, ctx_);
    const Tensor sum = memory_.Alloc(DType::kF64, {1}), losses = memory_.Alloc(DType::kF64, {1});
    const Tensor control = memory_.Alloc(DType::kF64, {kAdamWControlSize});
    const Tensor ranges = memory_.Alloc(DType::kI64, {200, 2});
    std::vector<int64_t> bounds;  // 200 tensors, every other one with decay
    for (int64_t i = 0; i < 400; ++i) bounds.push_back(n / 400 * i);
    cuda::CopyToDevice(ranges.raw(), bounds.data(), ranges.bytes(), ctx_.stream);
    for (const Tensor& t : {sum, losses, control}) Fill(t, 0, ctx_);
    const AdamWSettings settings{.lr = 1e-4, .weight_decay = 0.1, .clip = 1};
    Report("sum of squares, f32", 4 * n, [&](int) { AddSumOfSquares(sum, grad, ctx_); });
    Report("AdamW prepare", 0, [&](int) { AdamWPrepare(control, sum, losses, settings, ctx_); });
    AdamWPrepare(control, sum, losses, settings, ctx_);
    Report("AdamW", 30 * n,
           [&](int) { AdamW(weight, master, m, v, grad, ranges, control, settings, ctx_); });
    Report("AdamW, bf16 moments", 22 * n,
           [&](int) { AdamW(weight, master, m16, v16, grad, ranges, control, settings, ctx_); });
    Report("AdamW, f32 weights", 28 * n,
           [&](int) { AdamW(master, master, m, v, grad, ranges, control, settings, ctx_); });
  }

  void Elementwise(int64_t rows, int64_t cols) {
    const ArenaScope scope(&memory_);
    const int64_t n = rows * cols;
    Tensor a[kSets], b[kSets], wide[kSets];
    for (int s = 0; s < kSets; ++s) {
      for (Tensor* t : {&a[s], &b[s]}) *t = Normal({rows, cols});
      wide[s] = Normal({rows, cols}, DType::kF32);
    }
    const RandomStream random(1, RandomPurpose::kSynthetic, 0);
    Report("add in place", 6 * n, [&](int s) { AddInPlace(a[s], b[s], ctx_); });
    Report("copy", 4 * n, [&](int s) { Copy(a[s], b[s], ctx_); });
    Report("copy f32 to bf16", 6 * n, [&](int s) { Copy(a[s], wide[s], ctx_); });
    Report("fill", 2 * n, [&](int s) { Fill(a[s], 1, ctx_); });
    Report("fill normal", 2 * n, [&](int s) { FillNormal(a[s], random, 0, cols, 1, ctx_); });
  }

  std::string only_, title_;
  int64_t copy_bytes_ = 0;
  double copy_rate_ = 0;
  uint64_t seed_ = 0;
  Arena memory_{"operands", Device::kCuda, int64_t{20} << 30};
  Arena scratch_{"scratch", Device::kCuda, int64_t{256} << 20};
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
