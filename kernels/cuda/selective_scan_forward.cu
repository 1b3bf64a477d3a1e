// The selective scan's forward.
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/selective_scan.cuh"

namespace krait::cuda {
namespace {

constexpr int kStages = 4;  // chunks in flight

template <typename T>
struct ForwardArgs : ScanArgs<T> {
  TokenRows<const T> in[3];  // x, dt_raw, z
  TokenRows<T> y;
  float *final_state, *kept_states;
};

template <typename S>
struct ForwardShared {
  struct Stage {
    alignas(16) typename S::T tile[3][Tiles<S>::kSize];
    BcTile<S> bc;
    uint32_t cuts;
    Barrier full, done;  // 33 arrivals per helper; one per computing warp
  };
  Stage stages[kStages];
  // Two chunks': one is computed with, the next prepared.
  alignas(16) float dt[2][S::kWarps][kWarpChannels][kPitch];
  ChannelInputs inputs[2][S::kWarps];
};

// A helper's part: the first three move x, dt_raw, and z and y, the last B, C and documents.
template <typename S>
__device__ void Help(ForwardShared<S>& shared, const ForwardArgs<typename S::T>& args, int b,
                     int c0, int helper, int lane) {
  using T = typename S::T;
  using Tile = Tiles<S>;
  const TokenRows<const T>& from = args.in[min(helper, 2)];
  const T* in = Tile::Start(from, b, 0, c0, lane);
  T* out = Tile::Start(args.y, b, 0, c0, lane);
  ChunkInputs<S> inputs;
  if (helper == 3) inputs.Fetch(args, b, 0, lane);
#pragma unroll 1
  for (int k = 0; k < args.chunks + kStages; ++k) {
    auto& stage = shared.stages[k % kStages];
    if (k >= kStages) {
      const int t0 = (k - kStages) * kSteps;
      stage.done.Wait(k / kStages - 1);
      if (helper == 2) Tile::Write(stage.tile[2], out, args.y, args, b, t0, c0, lane);
      out += static_cast<int64_t>(args.y.row) * kSteps;
      __syncwarp();
    }
    if (k >= args.chunks) continue;
    if (helper < 3) {
      Tile::Fetch(stage.tile[helper], in, from, args, b, k * kSteps, c0, lane);
      in += static_cast<int64_t>(from.row) * kSteps;
    } else {
      inputs.Put(stage.bc, &stage.cuts, args, b, k * kSteps, lane);
      if (k + 1 < args.chunks) inputs.Fetch(args, b, (k + 1) * kSteps, lane);
    }
    stage.full.ArriveAfterFetches();
    __syncwarp();
    if (lane == 0) stage.full.Arrive();
  }
}

#ifndef SCAN_POLY
#define SCAN_POLY 0
#endif
__device__ inline float StepDecay(int pair, int j, float x) {
  if (SCAN_POLY == 4 ? (j == 0 && pair % 2 == 0)
                     : SCAN_POLY == 8 ? j == 0 : SCAN_POLY == 16 ? j % 2 == 0 : false) {
    return Decay<true>(x);
  }
  return FastExp2(x);
}

template <typename S, int kBlocks>
__global__ void __launch_bounds__(S::kThreads, kBlocks)
    ForwardKernel(const __grid_constant__ ForwardArgs<typename S::T> args) {
  using T = typename S::T;
  using Shared = ForwardShared<S>;
  using Tile = Tiles<S>;
  constexpr bool kExact = S::kExact, kPlain = S::kPlain;
  constexpr int kRow = Tile::kRow, kGroups = S::kGroups;
  extern __shared__ __align__(16) char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, s = lane % 4;
  const int b = blockIdx.x / args.channel_blocks;
  const int c0 = blockIdx.x % args.channel_blocks * S::kColumns;
  InitBarriers<S>(shared.stages);
  if (warp >= S::kWarps) {
    if (S::kWarps == 8 && kBlocks == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    return Help<S>(shared, args, b, c0, warp - S::kWarps, lane);
  }
  if (S::kWarps == 8 && kBlocks == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 96;");
  const int channel = c0 + warp * kWarpChannels + g;
  const bool exists = channel < args.channels;
  const float d = exists ? args.d[channel] : 0.0f, bias = exists ? args.dt_bias[channel] : 0.0f;
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  const int64_t own = static_cast<int64_t>(channel) * args.states + 2 * s;  // within a state
  float a2[kGroups][4], h[kGroups][4];
  int count[kGroups];  // of states from the lane's first on
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    count[q] = exists ? args.states - 16 * q - 2 * s : 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a2[q][j] = DecayRate(args.a_log, StateOf(j, 0) < count[q], own + 16 * q + StateOf(j, 0));
    }
    LoadState<kPlain>(h[q], Offset(args.initial_state, b * state_size + own + 16 * q), count[q]);
  }
  float* kept = Offset(args.kept_states, b * args.chunks * state_size + own);

  // What belongs to a token and channel is computed a chunk ahead, so that its latencies hide among
  // the steps of the chunk before.
  const int at0 = warp * kWarpChannels + g;
  float x[4], gate[4], next_x[4], next_gate[4];
  const auto prepare = [&](int k, int buffer) {
    auto& stage = shared.stages[k % kStages];
    float dt[4], dtx[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int at = at0 + TokenOf(v, s) * kRow;
      next_x[v] = ToFloat(stage.tile[0][at]);
      dt[v] = Softplus<kExact>(ToFloat(stage.tile[1][at]) + bias).value;
      dtx[v] = dt[v] * next_x[v];
      const float z = ToFloat(stage.tile[2][at]);
      next_gate[v] = z * Sigmoid<kExact>(z);
    }
    float* dts = shared.dt[buffer][warp][g];
    *reinterpret_cast<float2*>(dts + 2 * s) = {dt[0], dt[1]};
    *reinterpret_cast<float2*>(dts + 8 + 2 * s) = {dt[2], dt[3]};
    shared.inputs[buffer][warp].template Set<kExact>(dtx, g, s);
  };
  for (int i = 0; i < 2; ++i) shared.inputs[i][warp].Clear(lane);
  __syncwarp();
  const int last = args.chunks - 1;
  shared.stages[0].full.Wait(0);
  prepare(0, 0);

  bool next_is_full = false;
  for (int k = 0; k <= last; ++k) {
    auto& stage = shared.stages[k % kStages];
    float* dts = shared.dt[k % 2][warp][g];
    const ChannelInputs& inputs = shared.inputs[k % 2][warp];
    const int steps = args.time - k * kSteps, next = min(k + 1, last), later = min(k + 2, last);
    const uint32_t cuts = stage.cuts;
    if (steps < kSteps || cuts != 0) AdjustDecay(dts, s, steps, cuts);
    if (!next_is_full) shared.stages[next % kStages].full.Wait(next / kStages);
    __syncwarp();
    next_is_full = shared.stages[later % kStages].full.Done(later / kStages);
    float sum[4] = {};
#pragma unroll
    for (int v = 0; v < 4; ++v) x[v] = next_x[v], gate[v] = next_gate[v];

    // Tokens 8 * half to 8 * half + 7 of the states of group q.
    const auto run = [&](int q, int half) {
      if constexpr (kExact) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int t = 8 * half + i;
          float part = 0.0f;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int n = 16 * q + StateOf(j, s);
            h[q][j] = fmaf(Decay<kExact>(dts[t] * a2[q][j]), h[q][j],
                           stage.bc.b[t][n] * inputs.dtx[g * ChannelInputs::kChannel + t]);
            part = fmaf(stage.bc.c[t][n], h[q][j], part);
          }
          part = QuadSum(part);
          if (s == i / 2) sum[2 * half + i % 2] += part;
        }
      } else {
        const float* c = &stage.bc.c[8 * half + g][16 * q + 2 * s];
        const auto c_low = Load<2>(c), c_high = Load<2>(c + 8);
        const InputProducts products(inputs, stage.bc, q, half, g, s);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const auto dt = Load<2>(dts + 8 * half + 2 * pair);
          float even[4], odd[4], sums[4];
          products.Pair(pair, even, odd);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            even[j] = fmaf(StepDecay(pair, j, dt.v[0] * a2[q][j]), h[q][j], even[j]);
            odd[j] = fmaf(FastExp2(dt.v[1] * a2[q][j]), even[j], odd[j]);
            h[q][j] = odd[j];
          }
          SumOverStates(sums, even, odd, {c_low.v[0], c_low.v[1], c_high.v[0], c_high.v[1]});
          if (s == pair) {
            sum[2 * half] = kGroups == 1 ? sums[0] : sum[2 * half] + sums[0];
            sum[2 * half + 1] = kGroups == 1 ? sums[3] : sum[2 * half + 1] + sums[3];
          }
        }
      }
    };
#pragma unroll 1
    for (int q = 0; q < kGroups; ++q) {
      StoreState<kPlain>(Offset(kept, 16 * q), count[q], h[q]);
      run(q, 0);
      if (q == kGroups - 1) prepare(next, (k + 1) % 2);
      run(q, 1);
    }
    kept = Offset(kept, state_size);

    T* y = stage.tile[2] + at0;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      y[TokenOf(v, s) * kRow] = FromFloat<T>(fmaf(d, x[v], sum[v]) * gate[v]);
    }
    __syncwarp();
    if (lane == 0) stage.done.Arrive();
  }
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    StoreState<kPlain>(Offset(args.final_state, b * state_size + own + 16 * q), count[q], h[q]);
  }
}

template <typename S, int kBlocks>
void Run(const ForwardArgs<typename S::T>& from, int64_t batch, const Context& ctx) {
  auto args = from;
  args.channel_blocks = (args.channels + S::kColumns - 1) / S::kColumns;
  Launch("SelectiveScanForward", ForwardKernel<S, kBlocks>, batch * args.channel_blocks,
         S::kThreads, static_cast<int64_t>(sizeof(ForwardShared<S>)), ctx, args);
}

}  // namespace

void SelectiveScanForward(Tensor y, Tensor final_state, Tensor kept_states,
                          const SelectiveScanInputs& in, const Context& ctx) {
  if (in.x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    ForwardArgs<T> args{};
    static_cast<ScanArgs<T>&>(args) = ScanArgsOf<T>(in);
    args.in[0] = TokenRowsOf<const T>(in.x), args.in[1] = TokenRowsOf<const T>(in.dt_raw);
    args.in[2] = TokenRowsOf<const T>(in.z), args.y = TokenRowsOf<T>(y);
    args.final_state = DataOf<float>(final_state);
    args.kept_states = DataOf<float>(kept_states);
    const int64_t batch = in.x.dim(0);
    const bool plain = args.states == 16 && AlignedRows(in.x) && AlignedRows(in.dt_raw) &&
                       AlignedRows(in.z) && AlignedRows(y);
    if (args.states > 16) {
      Run<Shape<T, 4, 4, false>, 1>(args, batch, ctx);
    } else if (!plain) {
      Run<Shape<T, 8, 1, false>, 1>(args, batch, ctx);
    } else if (batch * ((args.channels + 63) / 64) < 96) {
      Run<Shape<T, 4, 1, true>, 1>(args, batch, ctx);
    } else if (batch * ((args.channels + 63) / 64) <= 132) {
      Run<Shape<T, 8, 1, true>, 1>(args, batch, ctx);
    } else {
      Run<Shape<T, 8, 1, true>, 2>(args, batch, ctx);
    }
  };
  in.x.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

}  // namespace krait::cuda
