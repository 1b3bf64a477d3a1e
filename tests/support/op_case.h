// One description of a call of an op, from which it is tested on every device and in every dtype.
//
//   OpCase("RmsNormForward", "5 x 7")
//       .Out("y", kCompute, {5, 7}, Sum(7)).Pad(3)
//       .Out("rstd", kWide, {5}, Sum(7))
//       .In("x", kCompute, {5, 7}, Normal(1)).Pad(2)
//       .In("w", kWide, {7}, Normal(2))
//       .Call([](const Operands& t, const Context& ctx) {
//         RmsNormForward(t["y"], t["rstd"], t["x"], t["w"], kEps, ctx);
//       });
//
// What is checked, on operands that hold the same values wherever they are:
//   CPU f32    against CPU f64, within the tolerance of each output
//   CPU bf16   exactly the rounding of the f32 op on the widened operands
//   planning   the same scratch as the run and nothing written, for either device
//   CUDA       f32 against CPU f64, bf16 against CPU bf16 (tests/kernels/op_cases_gpu_test.cc)
// and of every run: outputs are written wherever they should be (they hold NaN before), inputs and
// the padding between rows keep their bits.
#ifndef KRAIT_TESTS_SUPPORT_OP_CASE_H_
#define KRAIT_TESTS_SUPPORT_OP_CASE_H_

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/context.h"
#include "support/gradcheck.h"

namespace krait::testing {

// The dtype of an operand: the compute dtype, Wide of it, or one that does not depend on it.
enum class OperandType { kCompute, kWide, kF64, kI32, kI64 };

inline DType TypeOf(OperandType type, DType compute) {
  switch (type) {
    case OperandType::kCompute:
      return compute;
    case OperandType::kWide:
      return Wide(compute);
    case OperandType::kF64:
      return DType::kF64;
    case OperandType::kI32:
      return DType::kI32;
    case OperandType::kI64:
      return DType::kI64;
  }
  return DType::kF64;
}

// Gives an operand its values before the call.
using Initial = std::function<void(Buf*)>;

inline Initial Normal(uint64_t seed, double scale = 1, double shift = 0) {
  return [=](Buf* buf) { buf->FillNormal(seed, scale, shift); };
}
inline Initial Integers(uint64_t seed, int64_t low, int64_t high) {
  return [=](Buf* buf) { buf->FillIntegers(seed, low, high); };
}
inline Initial Constant(double value) {
  return [=](Buf* buf) { buf->Fill(value); };
}
inline Initial List(std::vector<double> values) {
  return [values = std::move(values)](Buf* buf) { buf->Assign(values); };
}
// `initial`, after which the rows [begin, end) hold `value`.
inline Initial WithRows(Initial initial, int64_t begin, int64_t end, double value) {
  return [=](Buf* buf) {
    initial(buf);
    const Tensor t = *buf;
    for (int64_t i = begin * t.dim(-1); i < end * t.dim(-1); ++i) Set(t, i, value);
  };
}

// How far a result in f32 may be from the exact one.
//
// A sum of n rounded terms is off by about sqrt(n) * 2^-24 of its terms' size, the handful of
// further roundings by a few 2^-24: Bound() = 4 * (sqrt(n) + 4) * 2^-24 of that size leaves a
// factor of 4 and more. (A result that was computed in bf16 or TF32 anywhere is off by 2^-9 or
// 2^-11.)
struct Tolerance {
  double terms = 0;  // 0: the result is exact
  double size = 0;   // of the largest term; 0: the largest of the output's elements

  double Bound(double largest) const {
    if (terms == 0) return 0;
    return 4 * (std::sqrt(terms) + 4) * 0x1p-24 * (size > 0 ? size : largest);
  }
};
inline Tolerance Exact() { return {}; }
inline Tolerance Sum(int64_t terms, double size = 0) { return {static_cast<double>(terms), size}; }

struct OpOperand {
  std::string name;
  OperandType type;
  std::vector<int64_t> shape;
  bool in, out;
  Initial initial;
  Tolerance tolerance;  // of outputs
  int64_t pad = 0;      // elements between rows
};

// The tensors of one run, by name.
class Operands {
 public:
  Operands(const std::vector<OpOperand>& names, std::vector<Tensor> tensors)
      : names_(names), tensors_(std::move(tensors)) {}
  Tensor operator[](const std::string& name) const {
    for (size_t i = 0; i < names_.size(); ++i) {
      if (names_[i].name == name) return tensors_[i];
    }
    KRAIT_FATAL("the case has no operand " + name);
  }

 private:
  const std::vector<OpOperand>& names_;
  std::vector<Tensor> tensors_;
};

class OpCase {
 public:
  using Function = std::function<void(const Operands&, const Context&)>;

  OpCase(std::string op, std::string what) : op_(std::move(op)), what_(std::move(what)) {}

  OpCase& In(const char* name, OperandType type, std::vector<int64_t> shape, Initial initial) {
    operands_.push_back({name, type, std::move(shape), true, false, std::move(initial), {}});
    return *this;
  }
  // Every element is written and none is read.
  OpCase& Out(const char* name, OperandType type, std::vector<int64_t> shape, Tolerance tolerance) {
    operands_.push_back({name, type, std::move(shape), false, true, {}, tolerance});
    return *this;
  }
  // Added to, or written in part.
  OpCase& InOut(const char* name, OperandType type, std::vector<int64_t> shape, Initial initial,
                Tolerance tolerance) {
    operands_.push_back({name, type, std::move(shape), true, true, std::move(initial), tolerance});
    return *this;
  }
  // Elements between the rows of the operand added last.
  OpCase& Pad(int64_t pad) {
    operands_.back().pad = pad;
    return *this;
  }
  OpCase& Call(Function call) {
    call_ = std::move(call);
    return *this;
  }
  // For an op that rounds values within (h of the residual norm, what two joined ops hand over):
  // the same in f32 with those roundings to bf16, RoundToBF16(), written out.
  OpCase& CallWithRoundings(Function call) {
    call_with_roundings_ = std::move(call);
    return *this;
  }
  // CUDA's version in bf16 rounds values within that the CPU's keeps in f32: what the tensor cores
  // multiply by has to be bf16.
  // bf16 has loops of its own on the CPU, whose sums may be in another order than those of f32.
  OpCase& OwnBf16Loops() {
    own_bf16_loops_ = true;
    return *this;
  }
  bool own_bf16_loops() const { return own_bf16_loops_; }
  OpCase& CudaRoundsWithin() {
    cuda_rounds_within_ = true;
    return *this;
  }
  // The case describes the CPU only; `reason` says where CUDA is tested.
  OpCase& CpuOnly(std::string reason) {
    cpu_only_ = std::move(reason);
    return *this;
  }

  const std::string& op() const { return op_; }
  const std::string& what() const { return what_; }
  const std::string& cpu_only() const { return cpu_only_; }
  const std::vector<OpOperand>& operands() const { return operands_; }
  bool rounds_within() const { return call_with_roundings_ != nullptr; }
  bool cuda_rounds_within() const { return cuda_rounds_within_ || rounds_within(); }
  void Run(const Operands& t, const Context& ctx) const { call_(t, ctx); }
  void RunWithRoundings(const Operands& t, const Context& ctx) const {
    rounds_within() ? call_with_roundings_(t, ctx) : call_(t, ctx);
  }

 private:
  std::string op_, what_, cpu_only_;
  std::vector<OpOperand> operands_;
  Function call_, call_with_roundings_;
  bool cuda_rounds_within_ = false, own_bf16_loops_ = false;
};
inline std::ostream& operator<<(std::ostream& out, const OpCase& c) {
  return out << c.op() << " " << c.what();
}

// Rounds the elements of a tensor in f32 to bf16, in place.
inline void RoundToBF16(Tensor t, const Context& ctx) {
  for (int64_t i = 0; i < t.numel() && !ctx.planning; ++i) {
    Set(t, i, FromBF16(ToBF16(static_cast<float>(Get(t, i)))));
  }
}

// The CPU tensors of a case under a compute dtype, initialised, outputs that are only written with
// NaN (integers: -77).
class CaseTensors {
 public:
  CaseTensors(const OpCase& c, DType compute, bool padded = true) : case_(c) {
    for (const OpOperand& operand : c.operands()) {
      Buf& buf = bufs_.emplace_back(TypeOf(operand.type, compute), operand.shape,
                                    padded ? operand.pad : 0);
      if (operand.in) {
        operand.initial(&buf);
      } else {
        const bool integer = operand.type == OperandType::kI32 || operand.type == OperandType::kI64;
        buf.Fill(integer ? -77 : std::numeric_limits<double>::quiet_NaN());
      }
    }
  }
  // The same values in another dtype, so that both runs compute from the same numbers.
  void TakeInputs(const CaseTensors& from) {
    for (size_t i = 0; i < bufs_.size(); ++i) {
      if (case_.operands()[i].in) bufs_[i].Assign(Values(from.bufs_[i]));
    }
  }
  Operands tensors() const {
    return {case_.operands(), std::vector<Tensor>(bufs_.begin(), bufs_.end())};
  }
  const OpCase& op_case() const { return case_; }
  const Buf& operator[](size_t i) const { return bufs_[i]; }
  size_t size() const { return bufs_.size(); }

 private:
  const OpCase& case_;
  std::vector<Buf> bufs_;
};

// What a run must leave alone: inputs, and the padding between rows.
inline void ExpectOthersUntouched(const CaseTensors& after, const CaseTensors& before) {
  for (size_t i = 0; i < after.size(); ++i) {
    const OpOperand& operand = after.op_case().operands()[i];
    EXPECT_TRUE(after[i].PaddingIntact()) << operand.name << ": padding was written";
    if (!operand.out) {
      EXPECT_TRUE(SameBits(after[i], before[i])) << operand.name << ": an input was written";
    }
  }
}

inline double LargestElement(Tensor t) {
  double largest = 0;
  for (const double value : Values(t)) {
    if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
  }
  return largest;
}

// NaN is wrong wherever it stands: it is what outputs hold before they are written.
//
// Fails once for all elements that `wrong` finds wrong (given element of `actual` and of
// `expected`), with the first of them.
template <typename Wrong>
void ExpectNone(const std::string& what, Tensor actual, Tensor expected, const Wrong& wrong) {
  int64_t count = 0, first = 0;
  for (int64_t i = expected.numel() - 1; i >= 0; --i) {
    if (wrong(Get(actual, i), Get(expected, i))) ++count, first = i;
  }
  if (count == 0) return;
  ADD_FAILURE() << what << ": " << count << " of " << expected.numel() << " elements, element "
                << first << " is " << Get(actual, first) << ", not " << Get(expected, first);
}

// Every element of `actual` within the tolerance of the exact result.
inline void ExpectWithin(const OpOperand& operand, Tensor actual, Tensor exact) {
  const double bound = operand.tolerance.Bound(LargestElement(exact));
  ExpectNone(operand.name + " within " + std::to_string(bound), actual, exact,
             [bound](double a, double e) { return !(std::fabs(a - e) <= bound || a == e); });
}

// CPU f32 against CPU f64.
inline void CheckFloat(const OpCase& c) {
  const CaseTensors before(c, DType::kF32);
  CaseTensors actual(c, DType::kF32), exact(c, DType::kF64);
  exact.TakeInputs(actual);
  const TestContext ctx;
  c.Run(actual.tensors(), ctx);
  c.Run(exact.tensors(), ctx);
  ExpectOthersUntouched(actual, before);
  for (size_t i = 0; i < actual.size(); ++i) {
    if (c.operands()[i].out) ExpectWithin(c.operands()[i], actual[i], exact[i]);
  }
}

// One of a thousand elements may be the next bf16: a sum that is off by a few 2^-24 crosses one of
// the boundaries 2^-9 of a value apart for far fewer.
inline void ExpectFewNeighbours(const std::string& name, Tensor actual, Tensor expected) {
  int64_t different = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double a = Get(actual, i), e = Get(expected, i);
    if (a == e) continue;
    ++different;
    EXPECT_LE(std::fabs(a - e), 0x1p-7 * std::fabs(e)) << name << " at element " << i;
  }
  EXPECT_LE(different, 1 + expected.numel() / 1000) << name;
}

// CPU bf16 is bit for bit the rounding of the f32 op on the widened operands, which are dense; but
// for ops with loops of their own, whose sums are in the order that the instruction set gives them.
inline void CheckBFloat16(const OpCase& c) {
  const CaseTensors before(c, DType::kBF16);
  CaseTensors actual(c, DType::kBF16), wide(c, DType::kF32, /*padded=*/false);
  wide.TakeInputs(actual);
  const TestContext ctx;
  c.Run(actual.tensors(), ctx);
  c.RunWithRoundings(wide.tensors(), ctx);
  ExpectOthersUntouched(actual, before);
  for (size_t i = 0; i < actual.size(); ++i) {
    const OpOperand& operand = c.operands()[i];
    if (!operand.out) continue;
    Buf rounded(actual[i].tensor().dtype(), operand.shape);
    rounded.Assign(Values(wide[i]));
    if (c.own_bf16_loops()) {
      if (operand.type == OperandType::kCompute) {
        ExpectFewNeighbours(operand.name, actual[i], rounded);
      } else {
        ExpectWithin(operand, actual[i], rounded);
      }
      continue;
    }
    ExpectNone(operand.name + " rounded", actual[i], rounded,
               [](double a, double e) { return !(a == e && std::signbit(a) == std::signbit(e)); });
  }
}

// Tensors of `device` with the shapes and strides of `like`, which have no memory.
inline Operands WithoutMemory(const CaseTensors& like, Device device) {
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < like.size(); ++i) {
    const Tensor t = like[i];
    // Addresses only have to differ: nothing may be read or written.
    char* const address = reinterpret_cast<char*>(((i + 1) << 40));
    const int64_t stride = t.row_stride();
    const auto padded = [&](std::initializer_list<int64_t> shape) {
      return Tensor(address, t.dtype(), device, shape).Slice(-1, 0, t.dim(-1));
    };
    switch (t.rank()) {
      case 1:
        tensors.push_back(padded({t.dim(0)}));
        break;
      case 2:
        tensors.push_back(padded({t.dim(0), stride}));
        break;
      case 3:
        tensors.push_back(padded({t.dim(0), t.dim(1), stride}));
        break;
      default:
        tensors.push_back(padded({t.dim(0), t.dim(1), t.dim(2), stride}));
    }
  }
  return {like.op_case().operands(), tensors};
}

// The plan of a run on `device`: its scratch, from a run without memory and arithmetic.
inline int64_t PlannedScratch(const CaseTensors& tensors, Device device) {
  Arena measured("planned scratch", device);
  Context plan;
  plan.device = device;
  plan.scratch = &measured;
  plan.planning = true;
  tensors.op_case().Run(WithoutMemory(tensors, device), plan);
  EXPECT_EQ(measured.mark(), 0) << "scratch memory was not released";
  return measured.high_water();
}

// A CPU run takes the scratch that was planned for it; a run on CUDA, which has no f64, is planned
// without a GPU.
inline void CheckPlanning(const OpCase& c, DType compute) {
  CaseTensors tensors(c, compute);
  const int64_t planned = PlannedScratch(tensors, Device::kCpu);
  TestContext ctx(planned);
  c.Run(tensors.tensors(), ctx);
  EXPECT_EQ(ctx.scratch()->high_water(), planned) << Name(compute);
  if (c.cpu_only().empty() && compute != DType::kF64) PlannedScratch(tensors, Device::kCuda);
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_OP_CASE_H_
