#include "kernels/selective_scan.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/base/parallel_for.h"
#include "kernels/check_shape.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/selective_scan.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/selective_scan.h"

namespace krait {
namespace {

constexpr int64_t kBlock = cpu::kScanBlock;
constexpr int64_t kScanChunk = cpu::kScanChunk;

int64_t Chunks(int64_t t) { return (t + kScanChunk - 1) / kScanChunk; }

struct Sizes {
  int64_t batch, time, channels, states;
  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
  int64_t items() const { return batch * blocks(); }  // one sequence's block of channels each
};

// [B,T,width], each row without gaps.
void CheckRows(const char* op, const Operand& operand, const Sizes& s, int64_t width) {
  CheckShape(op, operand, {s.batch, s.time, width});
  KRAIT_CHECK(operand.tensor.stride(2) == 1);
}

void CheckState(const char* op, const Operand& operand, const Sizes& s) {
  if (operand.tensor.defined()) CheckDense(op, operand, {s.batch, s.channels, s.states});
}

void CheckKeptStates(const char* op, Tensor kept_states, const Sizes& s, Device device) {
  CheckDense(op, {"kept_states", kept_states},
             {s.batch, ScanStates(device, s.time), s.channels, s.states});
}

Sizes CheckInputs(const char* op, const SelectiveScanInputs& in) {
  CheckShape(op, {"x", in.x}, {-1, -1, -1});
  CheckShape(op, {"a_log", in.a_log}, {-1, -1});
  const Sizes s{in.x.dim(0), in.x.dim(1), in.x.dim(2), in.a_log.dim(1)};
  CheckRows(op, {"x", in.x}, s, s.channels);
  CheckRows(op, {"dt_raw", in.dt_raw}, s, s.channels);
  CheckRows(op, {"z", in.z}, s, s.channels);
  CheckRows(op, {"b", in.b}, s, s.states);
  CheckRows(op, {"c", in.c}, s, s.states);
  CheckDense(op, {"a_log", in.a_log}, {s.channels, s.states});
  CheckDense(op, {"d", in.d}, {s.channels});
  CheckDense(op, {"dt_bias", in.dt_bias}, {s.channels});
  CheckState(op, {"initial_state", in.initial_state}, s);
  const Tensor& doc_start = in.documents.doc_start;
  if (doc_start.defined()) CheckDense(op, {"doc_start", doc_start}, {s.batch, s.time});
  return s;
}

// Rows of `t` [B,T,X] from (batch, first), columns from `channel`.
template <typename T>
cpu::TimeRows<T> RowsFrom(Tensor t, int64_t batch, int64_t first, int64_t channel) {
  if (!t.defined()) return {};
  auto* data = t.data<std::remove_const_t<T>>();
  return {data + batch * t.stride(0) + first * t.stride(1) + channel, t.stride(1)};
}

// The parameters by block, padded with zeros.
template <typename T>
struct Parameters {
  T *a2, *d, *dt_bias;  // [blocks][N][kBlock], [blocks][kBlock] twice

  static Tensor Alloc(const Sizes& s, const Context& ctx) {
    return ctx.scratch->Alloc(kDTypeOf<T>, {s.blocks() * kBlock * (s.states + 2)});
  }
  Parameters(Tensor memory, const SelectiveScanInputs& in, const Sizes& s) {
    a2 = memory.data<T>();
    d = a2 + s.blocks() * kBlock * s.states;
    dt_bias = d + s.blocks() * kBlock;
    ParallelFor(s.blocks() * kBlock, kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) SetChannel(i, in, s);
    });
  }

 private:
  void SetChannel(int64_t i, const SelectiveScanInputs& in, const Sizes& s) {
    const bool used = i < s.channels;
    d[i] = used ? in.d.data<T>()[i] : T(0);
    dt_bias[i] = used ? in.dt_bias.data<T>()[i] : T(0);
    constexpr T log2_e = static_cast<T>(0x1.71547652b82fep0);
    for (int64_t n = 0; n < s.states; ++n) {
      const T a = used ? -std::exp(in.a_log.data<T>()[i * s.states + n]) : T(0);
      a2[(i / kBlock * s.states + n) * kBlock + i % kBlock] = a * log2_e;
    }
  }
};

template <typename T>
cpu::ScanChunk<T> ChunkOf(const SelectiveScanInputs& in, const Parameters<T>& parameters,
                          const Sizes& s, int64_t batch, int64_t block, int64_t first) {
  const int64_t channel = block * kBlock;
  cpu::ScanChunk<T> chunk{};
  chunk.steps = std::min(kScanChunk, s.time - first);
  chunk.width = std::min(kBlock, s.channels - channel);
  chunk.states = s.states;
  chunk.x = RowsFrom<const T>(in.x, batch, first, channel);
  chunk.dt_raw = RowsFrom<const T>(in.dt_raw, batch, first, channel);
  chunk.z = RowsFrom<const T>(in.z, batch, first, channel);
  chunk.b = RowsFrom<const T>(in.b, batch, first, 0);
  chunk.c = RowsFrom<const T>(in.c, batch, first, 0);
  if (in.documents.doc_start.defined()) {
    chunk.doc_start = in.documents.doc_start.data<int32_t>() + batch * s.time + first;
  }
  chunk.first = in.documents.first_position + first;
  chunk.a2 = parameters.a2 + block * kBlock * s.states;
  chunk.d = parameters.d + channel;
  chunk.dt_bias = parameters.dt_bias + channel;
  return chunk;
}

// Between a state as the interface has it, [channel][state], and lanes, [state][kBlock]. Undefined
// counts as zeros.
template <typename T>
void LoadState(T* lanes, Tensor state, const Sizes& s, int64_t row, int64_t block) {
  const int64_t width = std::min(kBlock, s.channels - block * kBlock);
  std::fill_n(lanes, s.states * kBlock, T(0));
  if (!state.defined()) return;
  const T* from = state.data<T>() + (row * s.channels + block * kBlock) * s.states;
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t n = 0; n < s.states; ++n) lanes[n * kBlock + i] = from[i * s.states + n];
  }
}

template <typename T>
void StoreState(Tensor state, const T* lanes, const Sizes& s, int64_t row, int64_t block) {
  if (!state.defined()) return;
  const int64_t width = std::min(kBlock, s.channels - block * kBlock);
  T* to = state.data<T>() + (row * s.channels + block * kBlock) * s.states;
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t n = 0; n < s.states; ++n) to[i * s.states + n] = lanes[n * kBlock + i];
  }
}

template <typename T>
void ForwardCpu(Tensor y, Tensor final_state, Tensor kept_states, const SelectiveScanInputs& in,
                const Sizes& s, const OpScope& op, const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  const Tensor parameter_memory = Parameters<T>::Alloc(s, ctx);
  const Tensor states = ctx.scratch->Alloc(kDTypeOf<T>, {s.items(), s.states, kBlock});
  if (op.planning()) return;
  const Parameters<T> parameters(parameter_memory, in, s);
  const int64_t chunks = Chunks(s.time);
  ParallelFor(s.items(), 1, [&](int64_t item, int64_t) {
    const int64_t batch = item / s.blocks(), block = item % s.blocks();
    T* h = states.data<T>() + item * s.states * kBlock;
    LoadState(h, in.initial_state, s, batch, block);
    for (int64_t k = 0; k < chunks; ++k) {
      StoreState(kept_states, h, s, batch * chunks + k, block);
      const int64_t first = k * kScanChunk;
      cpu::ScanForwardChunk(ChunkOf<T>(in, parameters, s, batch, block, first), h,
                            RowsFrom<T>(y, batch, first, block * kBlock));
    }
    StoreState(final_state, h, s, batch, block);
  });
}

// What each item carries from chunk to chunk, or adds up for the sums after the last.
template <typename T>
struct ItemSums {
  T *carry, *da;      // [items][N][kBlock]
  T *dd, *d_dt_bias;  // [items][kBlock]
  T *db, *dc;         // [items][kScanChunk][N], of the chunk at hand

  static Tensor Alloc(const Sizes& s, const Context& ctx) {
    return ctx.scratch->Alloc(kDTypeOf<T>,
                              {s.items(), 2 * kBlock * (s.states + 1) + 2 * kScanChunk * s.states});
  }
  ItemSums(Tensor memory, const Sizes& s) {
    const int64_t items = s.items();
    carry = memory.data<T>();
    da = carry + items * s.states * kBlock;
    dd = da + items * s.states * kBlock;
    d_dt_bias = dd + items * kBlock;
    db = d_dt_bias + items * kBlock;
    dc = db + items * kScanChunk * s.states;
    std::fill(da, db, T(0));
  }
};

// grad[batch, first + t] = sum over blocks, in order, of partial[item][t], for the chunk at hand.
template <typename T>
void SumBlocks(Tensor grad, const T* partial, const Sizes& s, int64_t first) {
  const int64_t steps = std::min(kScanChunk, s.time - first);
  ParallelFor(s.batch * steps, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t batch = r / steps, t = r % steps;
      T* row = RowsFrom<T>(grad, batch, first, 0)[t];
      for (int64_t block = 0; block < s.blocks(); ++block) {
        const T* from = partial + ((batch * s.blocks() + block) * kScanChunk + t) * s.states;
        for (int64_t n = 0; n < s.states; ++n) row[n] = block == 0 ? from[n] : row[n] + from[n];
      }
    }
  });
}

// The sums over sequences, in order, of what the items added up.
template <typename T>
void AddParameterGradients(const SelectiveScanGradients& grad, const ItemSums<T>& sums,
                           const SelectiveScanInputs& in, const Sizes& s) {
  const auto add_channel = [&](int64_t i) {
    const int64_t block = i / kBlock, lane = i % kBlock;
    T dd = 0, d_dt_bias = 0;
    for (int64_t batch = 0; batch < s.batch; ++batch) {
      const int64_t item = batch * s.blocks() + block;
      dd += sums.dd[item * kBlock + lane];
      d_dt_bias += sums.d_dt_bias[item * kBlock + lane];
    }
    grad.dd.data<T>()[i] += dd;
    grad.d_dt_bias.data<T>()[i] += d_dt_bias;
    for (int64_t n = 0; n < s.states; ++n) {
      T da = 0;
      for (int64_t batch = 0; batch < s.batch; ++batch) {
        const int64_t item = batch * s.blocks() + block;
        da += sums.da[(item * s.states + n) * kBlock + lane];
      }
      // A = -exp(A_log) is its own derivative.
      const int64_t at = i * s.states + n;
      grad.d_a_log.data<T>()[at] -= da * std::exp(in.a_log.data<T>()[at]);
    }
  };
  ParallelFor(s.channels, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) add_channel(i);
  });
}

// Chunks from the last to the first, the items of a chunk in parallel: so the partial sums of db
// and dc are needed for one chunk at a time.
template <typename T>
void BackwardCpu(const SelectiveScanGradients& grad, Tensor y, Tensor dy, Tensor d_final_state,
                 Tensor kept_states, const SelectiveScanInputs& in, const Sizes& s,
                 const OpScope& op, const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  const Tensor parameter_memory = Parameters<T>::Alloc(s, ctx);
  const Tensor sum_memory = ItemSums<T>::Alloc(s, ctx);
  const int64_t workspace_size = cpu::ScanBackwardWorkspace(s.states);
  const Tensor workspaces = ctx.scratch->Alloc(kDTypeOf<T>, {MaxThreads(), workspace_size});
  if (op.planning()) return;
  const Parameters<T> parameters(parameter_memory, in, s);
  const ItemSums<T> sums(sum_memory, s);
  for (int64_t item = 0; item < s.items(); ++item) {
    LoadState(sums.carry + item * s.states * kBlock, d_final_state, s, item / s.blocks(),
              item % s.blocks());
  }
  const int64_t chunks = Chunks(s.time);
  for (int64_t k = chunks - 1; k >= 0; --k) {
    const int64_t first = k * kScanChunk;
    ParallelFor(s.items(), 1, [&](int64_t item, int64_t) {
      const int64_t batch = item / s.blocks(), block = item % s.blocks();
      const int64_t channel = block * kBlock;
      T* workspace = workspaces.data<T>() + ThreadIndex() * workspace_size;
      LoadState(workspace, kept_states, s, batch * chunks + k, block);
      cpu::ScanChunkGradients<T> chunk{};
      chunk.dy = RowsFrom<const T>(dy, batch, first, channel);
      chunk.y = RowsFrom<T>(y, batch, first, channel);
      chunk.dx = RowsFrom<T>(grad.dx, batch, first, channel);
      chunk.d_dt_raw = RowsFrom<T>(grad.d_dt_raw, batch, first, channel);
      chunk.dz = RowsFrom<T>(grad.dz, batch, first, channel);
      chunk.db = sums.db + item * kScanChunk * s.states;
      chunk.dc = sums.dc + item * kScanChunk * s.states;
      chunk.carry = sums.carry + item * s.states * kBlock;
      chunk.da = sums.da + item * s.states * kBlock;
      chunk.dd = sums.dd + item * kBlock;
      chunk.d_dt_bias = sums.d_dt_bias + item * kBlock;
      cpu::ScanBackwardChunk(ChunkOf<T>(in, parameters, s, batch, block, first), chunk, workspace);
    });
    SumBlocks(grad.db, sums.db, s, first);
    SumBlocks(grad.dc, sums.dc, s, first);
  }
  for (int64_t item = 0; item < s.items(); ++item) {
    StoreState(grad.d_initial_state, sums.carry + item * s.states * kBlock, s, item / s.blocks(),
               item % s.blocks());
  }
  AddParameterGradients(grad, sums, in, s);
}

SelectiveScanInputs WidenedInputs(cpu::Widened* wide, SelectiveScanInputs in) {
  for (Tensor* t : {&in.x, &in.dt_raw, &in.b, &in.c, &in.z}) *t = wide->In(*t);
  return in;
}

}  // namespace

int64_t ScanStates(Device device, int64_t t) {
  return device == Device::kCuda ? (t + cuda::kScanSteps - 1) / cuda::kScanSteps : Chunks(t);
}

void SelectiveScanForward(Tensor y, Tensor final_state, Tensor kept_states,
                          const SelectiveScanInputs& inputs, const Context& ctx) {
  OpScope op(ctx, OpFamily::kScan, "SelectiveScanForward",
             {{"y", y},
              {"final_state", final_state},
              {"kept_states", kept_states},
              {"x", inputs.x},
              {"dt_raw", inputs.dt_raw},
              {"b", inputs.b},
              {"c", inputs.c},
              {"z", inputs.z},
              {"a_log", inputs.a_log},
              {"d", inputs.d},
              {"dt_bias", inputs.dt_bias},
              {"initial_state", inputs.initial_state},
              {"doc_start", inputs.documents.doc_start}});
  cpu::Widened wide(ctx);
  y = wide.Out(y);
  const SelectiveScanInputs in = WidenedInputs(&wide, inputs);
  const Sizes s = CheckInputs(op.name(), in);
  CheckRows(op.name(), {"y", y}, s, s.channels);
  CheckState(op.name(), {"final_state", final_state}, s);
  if (kept_states.defined()) CheckKeptStates(op.name(), kept_states, s, ctx.device);
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(SelectiveScanForward(y, final_state, kept_states, in, ctx));
    return;
  }
  cpu::DispatchFloat(in.x, op.name(), [&](auto zero) {
    ForwardCpu<decltype(zero)>(y, final_state, kept_states, in, s, op, ctx);
  });
}

void SelectiveScanBackward(const SelectiveScanGradients& gradients, Tensor y, Tensor dy,
                           Tensor d_final_state, Tensor kept_states,
                           const SelectiveScanInputs& inputs, const Context& ctx) {
  OpScope op(ctx, OpFamily::kScan, "SelectiveScanBackward",
             {{"dx", gradients.dx},
              {"d_dt_raw", gradients.d_dt_raw},
              {"dz", gradients.dz},
              {"db", gradients.db},
              {"dc", gradients.dc},
              {"d_a_log", gradients.d_a_log},
              {"dd", gradients.dd},
              {"d_dt_bias", gradients.d_dt_bias},
              {"d_initial_state", gradients.d_initial_state},
              {"y", y},
              {"dy", dy},
              {"d_final_state", d_final_state},
              {"kept_states", kept_states},
              {"x", inputs.x},
              {"dt_raw", inputs.dt_raw},
              {"b", inputs.b},
              {"c", inputs.c},
              {"z", inputs.z},
              {"a_log", inputs.a_log},
              {"d", inputs.d},
              {"dt_bias", inputs.dt_bias},
              {"doc_start", inputs.documents.doc_start}});
  cpu::Widened wide(ctx);
  SelectiveScanGradients grad = gradients;
  for (Tensor* t : {&grad.dx, &grad.d_dt_raw, &grad.dz, &y}) *t = wide.Out(*t);
  dy = wide.In(dy);
  const SelectiveScanInputs in = WidenedInputs(&wide, inputs);
  const Sizes s = CheckInputs(op.name(), in);
  CheckRows(op.name(), {"dx", grad.dx}, s, s.channels);
  CheckRows(op.name(), {"d_dt_raw", grad.d_dt_raw}, s, s.channels);
  CheckRows(op.name(), {"dz", grad.dz}, s, s.channels);
  CheckRows(op.name(), {"dy", dy}, s, s.channels);
  CheckRows(op.name(), {"db", grad.db}, s, s.states);
  CheckRows(op.name(), {"dc", grad.dc}, s, s.states);
  if (y.defined()) CheckRows(op.name(), {"y", y}, s, s.channels);
  CheckDense(op.name(), {"d_a_log", grad.d_a_log}, {s.channels, s.states});
  CheckDense(op.name(), {"dd", grad.dd}, {s.channels});
  CheckDense(op.name(), {"d_dt_bias", grad.d_dt_bias}, {s.channels});
  CheckState(op.name(), {"d_final_state", d_final_state}, s);
  CheckState(op.name(), {"d_initial_state", grad.d_initial_state}, s);
  CheckKeptStates(op.name(), kept_states, s, ctx.device);
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor scratch = ctx.scratch->Alloc(
        DType::kF32,
        {cuda::ScanBackwardScratch(in.x.dtype(), s.batch, s.time, s.channels, s.states)});
    if (op.planning()) return;
    KRAIT_CUDA(SelectiveScanBackward(grad, y, dy, d_final_state, kept_states, in, scratch, ctx));
    return;
  }
  cpu::DispatchFloat(in.x, op.name(), [&](auto zero) {
    BackwardCpu<decltype(zero)>(grad, y, dy, d_final_state, kept_states, in, s, op, ctx);
  });
}

}  // namespace krait
