// The selective scan's forward. Per warp and chunk of 16 tokens: 480 instructions, 72 of them
// special functions (64 decays; 8 multiprocessor cycles each per quarter of it), 139 passes of
// shared memory.
//
// Learned on an H200 (B 2, T 4096, I 4096, N 16, bf16; 0.303 ms, 8 warps on a multiprocessor, about
// 2070 cycles a chunk at 1.75 GHz; special functions alone take 0.17). Helpers that move data: 0.39
// to 0.31 ms. Sums over states as TF32 products: as many instructions with one channel a lane as
// with four. No gain: B dt x as outer products by m16n8k4 (0.35: their latency shows), a loop over
// pairs of tokens with the next decays in flight (0.36), two channels a lane (0.304), two states a
// lane and twice the warps (0.34), a polynomial for 4 to 16 of the 64 decays (+0.5 to +12 %),
// softplus and gates by the helpers (0.42: four warps cannot keep up), six stages (0.32).
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
    alignas(16) float bc[ChunkInputs<S>::kFloats];
    uint32_t cuts;
    Barrier full, done;  // 33 arrivals per helper; one per computing warp
  };
  Stage stages[kStages];
  alignas(16) float dt[S::kWarps][kWarpChannels][kPitch];
  alignas(16) float dtx[S::kWarps][kWarpChannels][kPitch];
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

template <typename S, int kBlocks>
__global__ void __launch_bounds__(S::kThreads, kBlocks)
    ForwardKernel(const __grid_constant__ ForwardArgs<typename S::T> args) {
  using T = typename S::T;
  using Shared = ForwardShared<S>;
  using Tile = Tiles<S>;
  constexpr bool kExact = S::kExact, kPlain = S::kPlain;
  constexpr int kRow = Tile::kRow, kStates = S::kStates, kGroups = S::kGroups;
  extern __shared__ __align__(16) char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, s = lane % 4;
  const int b = blockIdx.x / args.channel_blocks;
  const int c0 = blockIdx.x % args.channel_blocks * S::kColumns;
  InitBarriers<S>(shared.stages);
  // With two blocks on a multiprocessor, registers move from the helpers to the computing warps.
  constexpr bool kMove = S::kWarps == 8 && kBlocks == 2;
  if (warp >= S::kWarps) {
    if (kMove) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    return Help<S>(shared, args, b, c0, warp - S::kWarps, lane);
  }
  if (kMove) asm volatile("setmaxnreg.inc.sync.aligned.u32 96;");
  const int channel = c0 + warp * kWarpChannels + g;
  const bool exists = channel < args.channels;
  const float d = exists ? args.d[channel] : 0.0f, bias = exists ? args.dt_bias[channel] : 0.0f;
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  const int64_t own = static_cast<int64_t>(channel) * args.states + 4 * s;  // within a state
  float a2[kGroups][4], h[kGroups][4];
  int count[kGroups];  // of the lane's states that exist
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    count[q] = exists ? args.states - 16 * q - 4 * s : 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) a2[q][j] = DecayRate(args.a_log, j < count[q], own + 16 * q + j);
    const float4 start =
        LoadState<kPlain>(Offset(args.initial_state, b * state_size + own + 16 * q), count[q]);
    h[q][0] = start.x, h[q][1] = start.y, h[q][2] = start.z, h[q][3] = start.w;
  }
  float* kept = Offset(args.kept_states, b * args.chunks * state_size + own);

  float* dts = shared.dt[warp][g];
  float* dtxs = shared.dtx[warp][g];
  // What belongs to a token and channel, computed a chunk ahead, so that its latencies hide among
  // the steps of the chunk before.
  float x[4], gate[4], next_dt[4], next_x[4], next_gate[4];
  const auto prepare = [&](int k) {
    auto& stage = shared.stages[k % kStages];
    stage.full.Wait(k / kStages);
    const int at0 = warp * kWarpChannels + g;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int at = at0 + TokenOf(v, s) * kRow;
      next_x[v] = ToFloat(stage.tile[0][at]);
      next_dt[v] = Softplus<kExact>(ToFloat(stage.tile[1][at]) + bias).value;
      const float z = ToFloat(stage.tile[2][at]);
      next_gate[v] = z * Sigmoid<kExact>(z);
    }
  };
  prepare(0);

#pragma unroll 1
  for (int k = 0; k < args.chunks; ++k) {
    auto& stage = shared.stages[k % kStages];
    __syncwarp();  // the last chunk's steps are read
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int t = TokenOf(v, s);
      *reinterpret_cast<float2*>(dts + t) = {next_dt[v], next_dt[v + 1]};
      *reinterpret_cast<float2*>(dtxs + t) = {next_dt[v] * next_x[v],
                                              next_dt[v + 1] * next_x[v + 1]};
      x[v] = next_x[v], x[v + 1] = next_x[v + 1];
      gate[v] = next_gate[v], gate[v + 1] = next_gate[v + 1];
    }
    const int steps = args.time - k * kSteps;
    const uint32_t cuts = stage.cuts;
    if (steps < kSteps || cuts != 0) AdjustDecay(dts, s, steps, cuts);
    __syncwarp();
    prepare(min(k + 1, args.chunks - 1));

    const float* bs = stage.bc + 4 * s;
    const float* cs = bs + kSteps * kStates;
    float sum[4] = {};
#pragma unroll 1
    for (int q = 0; q < kGroups; ++q) {
      StoreState<kPlain>(Offset(kept, 16 * q), count[q], h[q]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4 weights;
        if constexpr (!kExact) {
          weights = *reinterpret_cast<const float4*>(cs + (8 * half + g) * kStates + 16 * q);
        }
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
          const int first = 8 * half + 4 * quad;
          const auto dt = Load<4>(dts + first), dtx = Load<4>(dtxs + first);
          float even[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto bt = Load<4>(bs + (first + i) * kStates + 16 * q);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              h[q][j] = fmaf(Decay<kExact>(dt.v[i] * a2[q][j]), h[q][j], bt.v[j] * dtx.v[i]);
            }
            const int pair = 2 * quad + i / 2;
            if constexpr (kExact) {
              const auto ct = Load<4>(cs + (first + i) * kStates + 16 * q);
              float part = 0.0f;
#pragma unroll
              for (int j = 0; j < 4; ++j) part = fmaf(ct.v[j], h[q][j], part);
              part = QuadSum(part);
              if (s == pair) sum[2 * half + i % 2] += part;
            } else if (i % 2 == 0) {
#pragma unroll
              for (int j = 0; j < 4; ++j) even[j] = h[q][j];
            } else {
              float sums[4];
              SumOverStates(sums, even, h[q], weights);
              if (s == pair) {
                sum[2 * half] = kGroups == 1 ? sums[0] : sum[2 * half] + sums[0];
                sum[2 * half + 1] = kGroups == 1 ? sums[3] : sum[2 * half + 1] + sums[3];
              }
            }
          }
        }
      }
    }
    kept = Offset(kept, state_size);

    T* tile = stage.tile[2] + warp * kWarpChannels + g;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      tile[TokenOf(v, s) * kRow] = FromFloat<T>(fmaf(d, x[v], sum[v]) * gate[v]);
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
    const int64_t blocks = batch * ((args.channels + 63) / 64);
    if (args.states > 16) {
      Run<Shape<T, 4, 4, false>, 1>(args, batch, ctx);
    } else if (!plain) {
      Run<Shape<T, 8, 1, false>, 1>(args, batch, ctx);
    } else if (blocks < kFewBlocks) {
      Run<Shape<T, 4, 1, true>, 1>(args, batch, ctx);
    } else if (blocks <= kMultiprocessors) {
      Run<Shape<T, 8, 1, true>, 1>(args, batch, ctx);
    } else {
      Run<Shape<T, 8, 1, true>, 2>(args, batch, ctx);
    }
  };
  in.x.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

}  // namespace krait::cuda
