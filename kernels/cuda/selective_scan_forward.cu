// The selective scan's forward.
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/selective_scan.cuh"

namespace krait::cuda {
namespace {

constexpr int kStages = 6;  // chunks in flight

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
  alignas(16) float dt[S::kColumns][kPitch];  // as the decay takes it
  alignas(16) float dtx[S::kColumns][kPitch];
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
    }
    stage.full.ArriveAfterFetches();
    __syncwarp();
    if (lane == 0) stage.full.Arrive();
    if (helper == 3 && k + 1 < args.chunks) inputs.Fetch(args, b, (k + 1) * kSteps, lane);
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
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  constexpr int kPer = S::kPer;
  const int in_block = warp * kWarpChannels * kPer + g;  // channels of the lane: + 8 * p
  const int64_t own = static_cast<int64_t>(c0 + in_block) * args.states + 4 * s;  // within a state
  float a2[kPer][kGroups][4], h[kPer][kGroups][4], d[kPer], bias[kPer];
  int count[kPer][kGroups];  // of the lane's states that exist
#pragma unroll
  for (int p = 0; p < kPer; ++p) {
    const int channel = c0 + in_block + 8 * p;
    const bool exists = channel < args.channels;
    d[p] = exists ? args.d[channel] : 0.0f, bias[p] = exists ? args.dt_bias[channel] : 0.0f;
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const int64_t at = own + 8 * p * args.states + 16 * q;
      count[p][q] = exists ? args.states - 16 * q - 4 * s : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) a2[p][q][j] = DecayRate(args.a_log, j < count[p][q], at + j);
      const float4 start =
          LoadState<kPlain>(Offset(args.initial_state, b * state_size + at), count[p][q]);
      h[p][q][0] = start.x, h[p][q][1] = start.y, h[p][q][2] = start.z, h[p][q][3] = start.w;
    }
  }
  float* kept = Offset(args.kept_states, b * args.chunks * state_size + own);
  float(*dts)[kPitch] = shared.dt + in_block;
  float(*dtxs)[kPitch] = shared.dtx + in_block;

  // What belongs to a token and channel, computed a chunk ahead, so that its latencies hide among
  // the steps of the chunk before.
  float x[kPer][4], gate[kPer][4], next_dt[kPer][4], next_x[kPer][4], next_gate[kPer][4];
  const auto prepare = [&](int k) {
    auto& stage = shared.stages[k % kStages];
#pragma unroll
    for (int p = 0; p < kPer; ++p) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int at = in_block + 8 * p + TokenOf(v, s) * kRow;
        next_x[p][v] = ToFloat(stage.tile[0][at]);
        next_dt[p][v] = Softplus<kExact>(ToFloat(stage.tile[1][at]) + bias[p]).value;
        const float z = ToFloat(stage.tile[2][at]);
        next_gate[p][v] = z * Sigmoid<kExact>(z);
      }
    }
  };
  shared.stages[0].full.Wait(0);
  prepare(0);

  const int last = args.chunks - 1;
  bool next_is_full = false;
#pragma unroll 1
  for (int k = 0; k < args.chunks; ++k) {
    auto& stage = shared.stages[k % kStages];
    const int steps = args.time - k * kSteps;
    const uint32_t cuts = stage.cuts;
    __syncwarp();  // the last chunk's steps are read
#pragma unroll
    for (int p = 0; p < kPer; ++p) {
#pragma unroll
      for (int v = 0; v < 4; ++v) x[p][v] = next_x[p][v], gate[p][v] = next_gate[p][v];
#pragma unroll
      for (int v = 0; v < 4; v += 2) {
        const int t = TokenOf(v, s);
        const float dt0 = next_dt[p][v], dt1 = next_dt[p][v + 1];
        *reinterpret_cast<float2*>(dts[8 * p] + t) = {dt0, dt1};
        *reinterpret_cast<float2*>(dtxs[8 * p] + t) = {dt0 * x[p][v], dt1 * x[p][v + 1]};
      }
      if (steps < kSteps || cuts != 0) AdjustDecay(dts[8 * p], s, steps, cuts);
    }
    const int next = min(k + 1, last), later = min(k + 2, last);
    if (!next_is_full) shared.stages[next % kStages].full.Wait(next / kStages);
    __syncwarp();
    next_is_full = shared.stages[later % kStages].full.Done(later / kStages);
    prepare(next);

    const float* bs = stage.bc + 4 * s;
    const float* cs = bs + kSteps * kStates;
    float sum[kPer][4] = {};
#pragma unroll 1
    for (int q = 0; q < kGroups; ++q) {
#pragma unroll
      for (int p = 0; p < kPer; ++p) {
        StoreState<kPlain>(Offset(kept, 8 * p * args.states + 16 * q), count[p][q], h[p][q]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4 weights;
        if constexpr (!kExact) {
          weights = *reinterpret_cast<const float4*>(cs + (8 * half + g) * kStates + 16 * q);
        }
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
          const int first = 8 * half + 4 * quad;
          Pack<float, 4> dt[kPer], dtx[kPer];
#pragma unroll
          for (int p = 0; p < kPer; ++p) {
            dt[p] = Load<4>(dts[8 * p] + first), dtx[p] = Load<4>(dtxs[8 * p] + first);
          }
          float even[kPer][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int pair = 2 * quad + i / 2;
            const auto bt = Load<4>(bs + (first + i) * kStates + 16 * q);
#pragma unroll
            for (int p = 0; p < kPer; ++p) {
              float(&state)[4] = h[p][q];
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                state[j] =
                    fmaf(Decay<kExact>(dt[p].v[i] * a2[p][q][j]), state[j], bt.v[j] * dtx[p].v[i]);
              }
              if constexpr (kExact) {
                const auto ct = Load<4>(cs + (first + i) * kStates + 16 * q);
                float part = 0.0f;
#pragma unroll
                for (int j = 0; j < 4; ++j) part = fmaf(ct.v[j], state[j], part);
                part = QuadSum(part);
                if (s == pair) sum[p][2 * half + i % 2] += part;
              } else if (i % 2 == 0) {
#pragma unroll
                for (int j = 0; j < 4; ++j) even[p][j] = state[j];
              } else {
                float sums[4];
                SumOverStates(sums, even[p], state, weights);
                if (s == pair) {
                  float* to = sum[p] + 2 * half;
                  to[0] = kGroups == 1 ? sums[0] : to[0] + sums[0];
                  to[1] = kGroups == 1 ? sums[3] : to[1] + sums[3];
                }
              }
            }
          }
        }
      }
    }
    kept = Offset(kept, state_size);

#pragma unroll
    for (int p = 0; p < kPer; ++p) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        stage.tile[2][in_block + 8 * p + TokenOf(v, s) * kRow] =
            FromFloat<T>(fmaf(d[p], x[p][v], sum[p][v]) * gate[p][v]);
      }
    }
    __syncwarp();
    if (lane == 0) stage.done.Arrive();
  }
#pragma unroll
  for (int p = 0; p < kPer; ++p) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const int64_t at = b * state_size + own + 8 * p * args.states + 16 * q;
      StoreState<kPlain>(Offset(args.final_state, at), count[p][q], h[p][q]);
    }
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
    } else if (blocks < 96) {
      Run<Shape<T, 4, 1, true>, 1>(args, batch, ctx);
    } else if (blocks <= 132) {
      Run<Shape<T, 8, 1, true>, 1>(args, batch, ctx);
    } else {
      Run<Shape<T, 8, 1, true>, 2>(args, batch, ctx);
    }
  };
  in.x.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

}  // namespace krait::cuda
