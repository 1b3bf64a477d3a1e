// The CUDA selective scan against the CPU version of the same header in f64, on the same values.
//
// Bounds, on ||a - b|| / ||b||. bf16: twice the error that the CPU's f32 scan has once its results
// are rounded to bf16. f32: 8 * 2^-24, the bound of the CPU's own f32 test: a sum of N + 1 terms
// whose states carry the roundings of 1 / (1 - decay) ~ 5 steps; a gradient passes through the
// recurrence twice. Sums over all tokens (the parameters' gradients) add more terms: twice that.
#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "kernels/selective_scan.h"
#include "support/gradcheck.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::GpuContext;
using testing::kNaN;
using testing::OnGpu;
using testing::RelativeError;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;

struct Shape {
  int64_t batch, time, channels, states;
  int64_t pad = 0;    // elements between rows
  int64_t shift = 0;  // elements before the first, in device memory
  int64_t first_position = 0;
  int64_t dy_shift = 0;  // the same of dy alone
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B " << s.batch << " T " << s.time << " I " << s.channels << " N " << s.states
             << " pad " << s.pad << " shift " << s.shift << " from " << s.first_position
             << " shift of dy " << s.dy_shift;
}

// Values a trained model could have: time steps around softplus(-1), decays from exp(-dt/2) down.
// `c` is the dtype of the data, `wide` that of the rest.
struct Scan {
  Shape s;
  Buf x, dt_raw, b, c, z, a_log, d, dt_bias, initial_state, doc_start;
  Buf dy, d_final_state;
  Buf y, final_state, kept_states, y_again;
  Buf dx, d_dt_raw, dz, db, dc, d_a_log, dd, d_dt_bias, d_initial_state;

  Scan(DType type, DType wide, Shape shape, Device device)
      : s(shape),
        x(type, {s.batch, s.time, s.channels}, s.pad),
        dt_raw(type, {s.batch, s.time, s.channels}),
        b(type, {s.batch, s.time, s.states}, s.pad),
        c(type, {s.batch, s.time, s.states}, s.pad),
        z(type, {s.batch, s.time, s.channels}, s.pad),
        a_log(wide, {s.channels, s.states}),
        d(wide, {s.channels}),
        dt_bias(wide, {s.channels}),
        initial_state(wide, {s.batch, s.channels, s.states}),
        doc_start(DType::kI32, {s.batch, s.time}),
        dy(type, {s.batch, s.time, s.channels}),
        d_final_state(wide, {s.batch, s.channels, s.states}),
        y(type, {s.batch, s.time, s.channels}, s.pad),
        final_state(wide, {s.batch, s.channels, s.states}),
        kept_states(wide, {s.batch, ScanStates(device, s.time), s.channels, s.states}),
        y_again(type, {s.batch, s.time, s.channels}, s.pad),
        dx(type, {s.batch, s.time, s.channels}, s.pad),
        d_dt_raw(type, {s.batch, s.time, s.channels}, s.pad),
        dz(type, {s.batch, s.time, s.channels}, s.pad),
        db(wide, {s.batch, s.time, s.states}, s.pad),
        dc(wide, {s.batch, s.time, s.states}, s.pad),
        d_a_log(wide, {s.channels, s.states}),
        dd(wide, {s.channels}),
        d_dt_bias(wide, {s.channels}),
        d_initial_state(wide, {s.batch, s.channels, s.states}) {
    x.FillNormal(1), dt_raw.FillNormal(2, 0.7, -0.5), b.FillNormal(3), c.FillNormal(4);
    z.FillNormal(5), a_log.FillNormal(6, 0.5), d.FillNormal(7), dt_bias.FillNormal(8, 0.5, -0.5);
    initial_state.FillNormal(9), dy.FillNormal(10), d_final_state.FillNormal(11);
    for (Buf* out : Outputs()) out->Fill(kNaN);
    for (Buf* out : {&d_a_log, &dd, &d_dt_bias}) out->FillNormal(12);  // added to
    // No document begins here: the sequence goes on.
    doc_start.Fill(-1);
  }
  // The inputs of `other`, widened.
  void Assign(const Scan& other) {
    const std::vector<const Buf*> from = other.Inputs();
    for (size_t i = 0; i < from.size(); ++i) {
      const_cast<Buf*>(Inputs()[i])->Assign(Values(*from[i]));
    }
    for (auto [to, source] : {std::pair(&d_a_log, &other.d_a_log), std::pair(&dd, &other.dd),
                              std::pair(&d_dt_bias, &other.d_dt_bias)}) {
      to->Assign(Values(*source));
    }
  }
  std::vector<const Buf*> Inputs() const {
    return {&x,  &dt_raw,       &b, &c, &z, &a_log, &d, &dt_bias, &initial_state, &doc_start,
            &dy, &d_final_state};
  }
  std::vector<Buf*> Outputs() {
    return {&y,  &final_state, &y_again, &dx, &d_dt_raw,  &dz,
            &db, &dc,          &d_a_log, &dd, &d_dt_bias, &d_initial_state};
  }
  // Documents begin at these tokens of every row, one later in odd rows.
  void SetDocuments(const std::vector<int64_t>& starts) {
    for (int64_t r = 0; r < s.batch; ++r) {
      int64_t start = -1;
      for (int64_t t = 0; t < s.time; ++t) {
        for (int64_t begin : starts) {
          if (t == begin + (begin > 0 ? r % 2 : 0)) start = s.first_position + t;
        }
        Set(doc_start, r * s.time + t, static_cast<double>(start));
      }
    }
  }
  void RunOnCpu(bool documents, bool states) {
    const TestContext ctx;
    const Tensor none;
    const SelectiveScanInputs in = {x,
                                    dt_raw,
                                    b,
                                    c,
                                    z,
                                    a_log,
                                    d,
                                    dt_bias,
                                    states ? initial_state.tensor() : none,
                                    {documents ? doc_start.tensor() : none, s.first_position}};
    SelectiveScanForward(y, states ? final_state.tensor() : none, kept_states, in, ctx);
    SelectiveScanBackward({dx, d_dt_raw, dz, db, dc, d_a_log, dd, d_dt_bias,
                           states ? d_initial_state.tensor() : none},
                          y_again, dy, states ? d_final_state.tensor() : none, kept_states, in,
                          ctx);
  }
  void RunOnGpu(bool documents, bool states, bool in_place, const Context& ctx) {
    const Tensor none;
    OnGpu gx(x, s.shift), gdt(dt_raw, s.shift), gb(b, s.shift), gc(c, s.shift), gz(z, s.shift);
    OnGpu ga(a_log), gd(d), gbias(dt_bias), ginitial(initial_state), gdoc(doc_start);
    OnGpu gy(y, s.shift), gfinal(final_state), gkept(kept_states);
    const SelectiveScanInputs in = {gx,
                                    gdt,
                                    gb,
                                    gc,
                                    gz,
                                    ga,
                                    gd,
                                    gbias,
                                    states ? ginitial : none,
                                    {documents ? gdoc : none, s.first_position}};
    SelectiveScanForward(gy, states ? gfinal : none, gkept, in, ctx);
    OnGpu gdy(dy, s.shift + s.dy_shift), gdfinal(d_final_state), gagain(y_again, s.shift),
        gdx(dx, s.shift);
    OnGpu gddt(d_dt_raw, s.shift), gdz(dz, s.shift), gdb(db), gdc(dc), gda(d_a_log), gdd(dd);
    OnGpu gdbias(d_dt_bias), gdinitial(d_initial_state);
    if (in_place) {
      SelectiveScanBackward({gx, gdt, gz, gdb, gdc, gda, gdd, gdbias, states ? gdfinal : none}, gdy,
                            gdy, states ? gdfinal : none, gkept, in, ctx);
      for (OnGpu* out : {&gx, &gdt, &gz, &gdy, &gdfinal}) out->Download();
    } else {
      SelectiveScanBackward({gdx, gddt, gdz, gdb, gdc, gda, gdd, gdbias, states ? gdinitial : none},
                            gagain, gdy, states ? gdfinal : none, gkept, in, ctx);
      for (OnGpu* out : {&gdx, &gddt, &gdz, &gagain, &gdinitial}) out->Download();
    }
    for (OnGpu* out : {&gy, &gfinal, &gdb, &gdc, &gda, &gdd, &gdbias}) out->Download();
  }
};

const char* const kOutputNames[] = {
    "y",  "final_state", "y of the backward", "dx", "d_dt_raw",  "dz",
    "db", "dc",          "d_a_log",           "dd", "d_dt_bias", "d_initial_state"};

std::vector<double> Rounded(Tensor t) {
  std::vector<double> values = Values(t);
  for (double& v : values) v = testing::FromBF16(testing::ToBF16(static_cast<float>(v)));
  return values;
}

class SelectiveScanGpu : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    KRAIT_NEEDS_GPU();
    gpu_.emplace();
  }
  void Check(const Shape& s, const std::vector<int64_t>& documents, bool states) {
    SCOPED_TRACE(::testing::Message() << s << " states " << states);
    Scan gpu(GetParam(), kF32, s, Device::kCuda);
    gpu.SetDocuments(documents);
    Scan exact(kF64, kF64, s, Device::kCpu), cpu(kF32, kF32, s, Device::kCpu);
    exact.Assign(gpu), cpu.Assign(gpu);
    exact.RunOnCpu(!documents.empty(), states);
    cpu.RunOnCpu(!documents.empty(), states);
    gpu.RunOnGpu(!documents.empty(), states, false, gpu_->ctx);
    for (size_t i = 0; i < gpu.Outputs().size(); ++i) {
      const Buf& out = *gpu.Outputs()[i];
      EXPECT_TRUE(out.PaddingIntact()) << kOutputNames[i];
      if (!states && std::string(kOutputNames[i]).find("_state") != std::string::npos) continue;
      const std::vector<double> expected = Values(*exact.Outputs()[i]);
      double bound = 8 * 0x1p-24 * (i >= 8 ? 2 : 1);
      if (GetParam() == kBF16) bound = 2 * RelativeError(Rounded(*cpu.Outputs()[i]), expected);
      const double error = RelativeError(Values(out), expected);
      EXPECT_LE(error, bound) << kOutputNames[i];
    }
  }
  std::optional<GpuContext> gpu_;
};

TEST_P(SelectiveScanGpu, AgreesWithTheCpu) {
  // Whole and broken chunks of 16 tokens, blocks of 64 channels and warps of 8; rows that are
  // aligned, strided or shifted.
  Check({2, 64, 128, 16}, {}, true);
  Check({2, 300, 70, 16}, {100, 101, 250}, true);
  Check({2, 1, 512, 16}, {}, true);
  Check({2, 1, 520, 16}, {0}, true);
  Check({3, 17, 24, 16, 8}, {}, false);
  Check({2, 47, 72, 16, 8}, {0, 16, 17, 31, 32}, true);
  Check({2, 33, 67, 16, 3}, {5}, true);
  Check({1, 40, 64, 16, 0, 1}, {}, true);
  // Aligned rows in the forward, which keeps the states, and not in the backward.
  Check({2, 47, 72, 16, 8, 0, 0, 1}, {0, 20}, true);
  // Enough channels for blocks of 64 of them.
  Check({3, 50, 2056, 16}, {20}, true);
  Check({3, 50, 2059, 16, 5}, {20}, false);
  // Enough blocks for two on a multiprocessor.
  Check({5, 50, 2056, 16}, {20}, true);
}

TEST_P(SelectiveScanGpu, OtherNumbersOfStates) {
  for (int64_t states : {1, 3, 4, 8, 15, 17, 32, 50, 64}) {
    Check({2, 35, 41, states, 1}, {0, 20}, true);
  }
}

TEST_P(SelectiveScanGpu, PiecesOfASequence) {
  // Documents at the first token of a piece and inside it, by absolute position.
  Check({2, 40, 64, 16, 8, 0, 1000}, {0, 9}, true);
  Check({2, 40, 64, 16, 8, 0, 1000}, {16}, true);
}

TEST_P(SelectiveScanGpu, OutputsOverInputs) {
  for (const Shape& s : {Shape{2, 70, 128, 16}, Shape{2, 37, 67, 5, 3}}) {
    SCOPED_TRACE(::testing::Message() << s);
    Scan apart(GetParam(), kF32, s, Device::kCuda), over(GetParam(), kF32, s, Device::kCuda);
    apart.RunOnGpu(false, true, false, gpu_->ctx);
    over.RunOnGpu(false, true, true, gpu_->ctx);
    EXPECT_TRUE(SameBits(apart.dx, over.x));
    EXPECT_TRUE(SameBits(apart.d_dt_raw, over.dt_raw));
    EXPECT_TRUE(SameBits(apart.dz, over.z));
    EXPECT_TRUE(SameBits(apart.y_again, over.dy));
    EXPECT_TRUE(SameBits(apart.d_initial_state, over.d_final_state));
    for (auto [a, b] : {std::pair(&apart.db, &over.db), std::pair(&apart.dc, &over.dc),
                        std::pair(&apart.d_a_log, &over.d_a_log)}) {
      EXPECT_TRUE(SameBits(*a, *b));
    }
  }
}

TEST_P(SelectiveScanGpu, TwoRunsGiveTheSameBits) {
  for (const Shape& s : {Shape{2, 200, 256, 16}, Shape{4, 50, 2100, 16}, Shape{2, 70, 67, 20, 1}}) {
    SCOPED_TRACE(::testing::Message() << s);
    Scan one(GetParam(), kF32, s, Device::kCuda), two(GetParam(), kF32, s, Device::kCuda);
    for (Scan* scan : {&one, &two}) scan->RunOnGpu(false, true, false, gpu_->ctx);
    for (size_t i = 0; i < one.Outputs().size(); ++i) {
      EXPECT_TRUE(SameBits(*one.Outputs()[i], *two.Outputs()[i])) << kOutputNames[i];
    }
  }
}

// Steps of -1e-4 to -1e-3: a state lives for thousands of tokens.
TEST_P(SelectiveScanGpu, SlowDecays) {
  const Shape s{1, 5000, 64, 16};
  Scan gpu(GetParam(), kF32, s, Device::kCuda);
  gpu.dt_raw.FillNormal(2, 0.3, -5), gpu.dt_bias.Fill(-1), gpu.a_log.FillNormal(6, 0.5, -2);
  Scan exact(kF64, kF64, s, Device::kCpu), cpu(kF32, kF32, s, Device::kCpu);
  exact.Assign(gpu), cpu.Assign(gpu);
  for (Scan* scan : {&exact, &cpu}) scan->RunOnCpu(false, true);
  gpu.RunOnGpu(false, true, false, gpu_->ctx);
  for (size_t i = 0; i < gpu.Outputs().size(); ++i) {
    const std::vector<double> expected = Values(*exact.Outputs()[i]);
    const double of_cpu = GetParam() == kBF16 ? RelativeError(Rounded(*cpu.Outputs()[i]), expected)
                                              : RelativeError(Values(*cpu.Outputs()[i]), expected);
    const double error = RelativeError(Values(*gpu.Outputs()[i]), expected);
    // The two f32 versions round in different places: 4 times, not 2.
    EXPECT_LE(error, (GetParam() == kBF16 ? 2 : 4) * of_cpu) << kOutputNames[i];
  }
}

INSTANTIATE_TEST_SUITE_P(, SelectiveScanGpu, ::testing::Values(kF32, kBF16),
                         [](const auto& dtype) { return std::string(Name(dtype.param)); });

// Two equal sequences, together more than 2^31 elements: a wrapped offset would read and write the
// wrong rows of the second alone.
TEST(SelectiveScanGpuLarge, BeyondTwoToThe31Elements) {
  std::string reason;
  if (!cuda::Available(&reason)) GTEST_SKIP() << "no GPU: " << reason;
  constexpr int64_t kTime = 16400, kChannels = 65600, kN = 16, kPeriod = 1'000'003;
  static_assert(2 * kTime * kChannels > (int64_t{1} << 31));
  const int64_t kept = ScanStates(Device::kCuda, kTime);
  Arena memory(
      "test tensors", Device::kCuda,
      5 * 2 * kTime * kChannels * 2 + 2 * (kept + 1) * kChannels * kN * 4 + (int64_t{64} << 20));
  Arena scratch("test scratch", Device::kCuda, int64_t{6} << 30);
  Context ctx;
  ctx.device = Device::kCuda;
  ctx.scratch = &scratch;
  const auto fill = [&](Tensor t, uint64_t seed, double scale, double shift) {
    const int64_t size = SizeOf(t.dtype()), half = t.numel() / 2, count = std::min(kPeriod, half);
    Buf pattern(t.dtype(), {count});
    pattern.FillNormal(seed, scale, shift);
    auto* to = static_cast<char*>(t.raw());
    cuda::CopyToDevice(to, pattern.tensor().raw(), count * size);
    for (int64_t done = count; done < half; done *= 2) {
      cuda::CopyOnDevice(to + done * size, to, std::min(done, half - done) * size, ctx.stream);
    }
    cuda::CopyOnDevice(to + half * size, to, half * size, ctx.stream);
    cuda::Synchronize();
  };
  Tensor x, dt, z, dy, y;
  uint64_t seed = 0;
  for (Tensor* t : {&x, &dt, &z, &dy, &y}) {
    *t = memory.Alloc(kBF16, {2, kTime, kChannels});
    fill(*t, ++seed, t == &dt ? 0.7 : 1, t == &dt ? -0.5 : 0);
  }
  const Tensor b = memory.Alloc(kBF16, {2, kTime, kN}), c = memory.Alloc(kBF16, {2, kTime, kN});
  const Tensor db = memory.Alloc(kF32, {2, kTime, kN}), dc = memory.Alloc(kF32, {2, kTime, kN});
  const Tensor a_log = memory.Alloc(kF32, {kChannels, kN}), d = memory.Alloc(kF32, {kChannels});
  const Tensor bias = memory.Alloc(kF32, {kChannels});
  const Tensor states = memory.Alloc(kF32, {2, kept, kChannels, kN});
  fill(b, 6, 1, 0), fill(c, 7, 1, 0), fill(a_log, 8, 0.5, 0), fill(d, 9, 1, 0);
  fill(bias, 10, 0.5, -0.5);
  const SelectiveScanInputs in = {x, dt, b, c, z, a_log, d, bias, Tensor(), {}};
  SelectiveScanForward(y, Tensor(), states, in, ctx);
  const auto check = [&](const char* what, Tensor t) {
    Buf one(t.dtype(), {t.dim(2)}), two(t.dtype(), {t.dim(2)});
    for (int64_t row : {int64_t{0}, int64_t{7}, kTime / 2, kTime - 17, kTime - 16, kTime - 1}) {
      const int64_t bytes = t.dim(2) * SizeOf(t.dtype());
      cuda::CopyToHost(one.tensor().raw(), t.Slice(0, 0, 1).Slice(1, row, 1).raw(), bytes);
      cuda::CopyToHost(two.tensor().raw(), t.Slice(0, 1, 1).Slice(1, row, 1).raw(), bytes);
      EXPECT_TRUE(SameBits(one, two)) << what << " at token " << row;
      for (int64_t i = 0; i < 64 && i < t.dim(2); ++i) EXPECT_TRUE(std::isfinite(Get(one, i)));
    }
  };
  check("y", y);
  const Tensor da = memory.Alloc(kF32, {kChannels, kN}), dd = memory.Alloc(kF32, {kChannels});
  const Tensor dbias = memory.Alloc(kF32, {kChannels});
  SelectiveScanBackward({x, dt, z, db, dc, da, dd, dbias, Tensor()}, dy, dy, Tensor(), states, in,
                        ctx);
  for (auto [what, t] :
       {std::pair("dx", x), std::pair("d_dt_raw", dt), std::pair("dz", z),
        std::pair("y of the backward", dy), std::pair("db", db), std::pair("dc", dc)}) {
    check(what, t);
  }
}

}  // namespace
}  // namespace krait
