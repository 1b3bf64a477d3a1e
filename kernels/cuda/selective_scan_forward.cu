// The selective scan's forward. Per warp and chunk of 16 tokens: 435 instructions, 72 of them
// special functions (8 cycles of a scheduler's unit each), 32 matrix products; about 35 passes of
// shared memory.
//
// Learned on an H200 (bf16, N 16). A helper must not wait for memory: the one that loaded B and C a
// chunk ahead held 8 warps to a chunk in 2300 cycles whatever they did (B2 T4096 I4096: 0.307 ms),
// so that verdicts from before it fetched four chunks ahead (two channels a lane, two states a lane
// and twice the warps, polynomials for some decays, six stages) are void. B dt x as TF32 products:
// 16 in place of 64 multiplications and 20 loads. ptxas gives a warp a special function each 8
// cycles; decays four tokens ahead spread them over the loop (of one warp alone: 1080 cycles a
// chunk, 0.156 ms at B1). With four warps a scheduler (B4) the unit is busy for 2300 of 3300
// cycles and issue slots are 60 % taken. Softplus and gates by the helpers: 0.42, four warps cannot
// keep up.
//
// On an H100, versions in turns in one run (B4 I4096, B4 I8192, B2; ms): 0.467, 0.906, 0.240; with
// eight warps chunks in pairs, and 104 registers in place of 96 where two blocks share a
// multiprocessor: 0.446, 0.866, 0.233 (four warps, B1: 0.156, in pairs 0.153). No single unit
// binds: without the decays' special functions (wrong results) 0.394 at B4 I4096 of 0.462 in that
// run, without the sums over states 0.432, without these and the inputs' products 0.365.
// Inputs four tokens ahead too, and four warps in pairs: 0.451 to 0.440, 0.876 to 0.855, B2 0.233
// to 0.224, B1 0.157 to 0.148, the same bits; at B1 four chunks a turn 0.151.
// Polynomials (10 instructions) for 2 of 16 decays gained 2 % with 96 registers and lost 3 % with
// 104; a warp of its own for softplus and gates of each computing one gained 1 % at B1, where each
// scheduler has one, and lost 24 % at B2.
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/selective_scan.cuh"
#include "kernels/cuda/selective_scan_math.cuh"

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
    alignas(16) typename S::T tile[3][Tiles<S>::kSize];  // x, dt_raw, z and then y
    ChunkInputs<S, false> inputs;
    Barrier full, done;  // 33 arrivals per helper; one per computing warp
  };
  Stage stages[kStages];
  // Of two chunks: one is computed with, the next prepared.
  alignas(16) float dt[S::kWarps][2][kWarpChannels][kPitch];
  alignas(16) float dtx[S::kExact ? S::kWarps : 1][2][kWarpChannels][kPitch];  // f32 only
  InputFetcher<S, false> fetcher;
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
  auto& fetcher = shared.fetcher;
  if (helper == 3) {
    for (int k = 0; k < fetcher.kAhead; ++k) fetcher.FetchAhead(args, b, k, lane);
  }
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
      fetcher.FetchAhead(args, b, k + fetcher.kAhead, lane);
      fetcher.Fetch(&stage.inputs, args, b, k, lane);
    }
    stage.full.ArriveAfterFetches();
    __syncwarp();
    if (lane == 0) stage.full.Arrive();
  }
}

// f32: 16 steps of a lane's states of group q; adds to the sums over states of its tokens.
template <typename S>
__device__ inline void ExactSteps(float (&sum)[4], float (&h)[4], const float (&a2)[4],
                                  const ChunkInputs<S, false>& inputs, const float* dts,
                                  const float* dtxs, int q, int s) {
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    const auto bt = Load<4>(inputs.b[t] + 16 * q + 4 * s);
    const auto ct = Load<4>(inputs.c[t] + 16 * q + 4 * s);
    float part = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      h[j] = fmaf(Decay<true>(dts[t] * a2[j]), h[j], bt.v[j] * dtxs[t]);
      part = fmaf(ct.v[j], h[j], part);
    }
    part = QuadSum(part);
    if (s == t % 8 / 2) sum[t / 8 * 2 + t % 2] += part;
  }
}

// bf16: the decays of four tokens, the first of which has *dt.
__device__ inline void Decays(float (&decay)[4][4], const float* dt, const float (&a2)[4]) {
  const auto dt4 = Load<4>(dt);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) decay[i][j] = FastExp2(dt4.v[i] * a2[j]);
  }
}
// Four steps, tokens 4 * quad and on, with their decays and inputs, and matrices of C.
template <bool kAdd>
__device__ inline void FourSteps(float (&sum)[4], float (&h)[4], const float (&decay)[4][4],
                                 const float (&input)[4][4], const uint32_t (&cs)[4], int quad,
                                 int s) {
  const int half = quad / 2;
  const float4 weights = WeightsOf(cs, half);
  float even[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i % 2 == 1) even[j] = h[j];
      h[j] = fmaf(decay[i][j], h[j], input[i][j]);
    }
    if (i % 2 == 0) continue;
    float sums[4];
    SumOverStates(sums, even, h, weights);
    if (s == quad % 2 * 2 + i / 2) {
      sum[2 * half] = kAdd ? sum[2 * half] + sums[0] : sums[0];
      sum[2 * half + 1] = kAdd ? sum[2 * half + 1] + sums[3] : sums[3];
    }
  }
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

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int b = blockIdx.x / args.channel_blocks;
  const int c0 = blockIdx.x % args.channel_blocks * S::kColumns;
  InitBarriers<S>(shared.stages);
  // With two blocks on a multiprocessor, registers move from the helpers to the computing warps.
  constexpr bool kMove = S::kWarps == 8 && kBlocks == 2;
  if (warp >= S::kWarps) {
    if (kMove) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    return Help<S>(shared, args, b, c0, warp - S::kWarps, lane);
  }
  if (kMove) asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
  const int g = lane / 4, columns = warp * kWarpChannels, channel = c0 + columns + g;
  int s = lane % 4;
  Keep(s);
  const bool exists = channel < args.channels;
  const float d = exists ? args.d[channel] : 0.0f, bias = exists ? args.dt_bias[channel] : 0.0f;
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  const int64_t own = static_cast<int64_t>(channel) * args.states;  // within a state
  float a2[kGroups][4], h[kGroups][4];
  int count[kGroups];  // of the channel's states from a group's first on
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    count[q] = exists ? args.states - 16 * q : 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = StateOf<kExact>(j, s);
      a2[q][j] = DecayRate(args.a_log, n < count[q], own + 16 * q + n);
    }
    LoadState<kPlain, kExact>(h[q], Offset(args.initial_state, b * state_size + own + 16 * q),
                              count[q], s);
  }
  const bool keeps = exists && args.kept_states != nullptr;
  const int64_t kept_step = keeps ? state_size : 0;
  float* kept = keeps ? args.kept_states + b * args.chunks * state_size + own : nullptr;
  // bf16, 16 states: decays and inputs are computed four tokens ahead.
  constexpr bool kAhead = !kExact && kGroups == 1;
  if (kAhead && kPlain && keeps) kept += 4 * s;

  // This lane's rows in LoadTransposed(): of x, or of dt_raw in the upper half of a warp; of z and
  // of y; of B. And its channel's row in shared.dt, which alternates.
  auto& first = shared.stages[0];
  uint32_t x_row = SharedAddress(first.tile[lane / 16] + lane % 16 * kRow + columns);
  uint32_t z_row = SharedAddress(first.tile[2] + lane % 16 * kRow + columns);
  uint32_t bc_row = SharedAddress(first.inputs.b[lane / 16 * 8 + lane % 8]) + lane / 8 % 2 * 16;
  int dt_row = (warp * 2 * kWarpChannels + g) * kPitch;
  int dt_rows = 2 * dt_row + kWarpChannels * kPitch;  // the sum of the two
  Keep(x_row), Keep(z_row), Keep(bc_row), Keep(dt_row), Keep(dt_rows);
  float* const dts = &shared.dt[0][0][0][0];
  float* const dtxs = &shared.dtx[0][0][0][0];

  // What belongs to a token and channel, computed a chunk ahead, so that its latencies hide among
  // the steps of the chunk before.
  float x[4], dtx[4], gate[4], next_x[4], next_dtx[4], next_gate[4];
  const auto prepare = [&](int k, int row) {
    const int in_stages = k % kStages;
    auto& stage = shared.stages[in_stages];
    float dt_raw[4], z[4];
    if constexpr (kExact) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int at = columns + g + TokenOf(v, s) * kRow;
        next_x[v] = stage.tile[0][at], dt_raw[v] = stage.tile[1][at], z[v] = stage.tile[2][at];
      }
    } else {
      const uint32_t offset = in_stages * static_cast<uint32_t>(sizeof(stage));
      uint32_t x_dt[4], zs[2];
      LoadTransposed(x_dt, x_row + offset), LoadTransposed(zs, z_row + offset);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const auto half = [&](uint32_t two) {
          return v % 2 == 0 ? LowerHalf(two) : UpperHalf(two);
        };
        next_x[v] = half(x_dt[v / 2]), dt_raw[v] = half(x_dt[2 + v / 2]), z[v] = half(zs[v / 2]);
      }
    }
    float dt[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      dt[v] = Softplus<kExact>(dt_raw[v] + bias);
      next_dtx[v] = dt[v] * next_x[v];
      next_gate[v] = Silu<kExact>(z[v]);
    }
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int at = row + TokenOf(v, s);
      *reinterpret_cast<float2*>(dts + at) = {dt[v], dt[v + 1]};
      if (kExact) *reinterpret_cast<float2*>(dtxs + at) = {next_dtx[v], next_dtx[v + 1]};
    }
    const uint32_t cuts = stage.inputs.cuts;
    if (cuts != 0) AdjustDecay(dt, dts + row, s, args.time - k * kSteps, cuts);
  };
  const int last = args.chunks - 1;
  shared.stages[0].full.Wait(0);
  prepare(0, dt_row);
  __syncwarp();
  float decay[2][4][4], input[2][4][4];
  uint32_t bs[4];
  // The lane's dt x of a chunk that is prepared, for InputsOfQuad().
  const auto round_dtx = [&] {
#pragma unroll
    for (int v = 0; v < 4; ++v) dtx[v] = kExact ? 0.0f : RoundTf32(next_dtx[v]);
  };
  if constexpr (kAhead) {
    round_dtx();
    LoadTransposed(bs, bc_row);
    Decays(decay[0], dts + dt_row, a2[0]), InputsOfQuad(input[0], dtx, bs, 0, 0, s);
  }

  bool next_is_full = false;
  // In pairs, what goes on to the next chunk stays in its registers.
  constexpr int kTurns = kAhead && kPlain ? 2 : 1;
#pragma unroll kTurns
  for (int k = 0; k <= last; ++k) {
    // Beyond the last chunk there is nothing to wait for and nothing of use.
    const int next = k + 1;
    const unsigned in_stages = static_cast<unsigned>(k) % kStages;
    auto& stage = shared.stages[in_stages];
    const uint32_t offset = in_stages * static_cast<uint32_t>(sizeof(stage));
#pragma unroll
    for (int v = 0; v < 4; ++v) x[v] = next_x[v], gate[v] = next_gate[v];
    if (!kAhead) round_dtx();
    if (!next_is_full && k < last) shared.stages[next % kStages].full.Wait(next / kStages);
    next_is_full =
        shared.stages[static_cast<unsigned>(k + 2) % kStages].full.Done((k + 2) / kStages);

    float sum[4] = {};
    if constexpr (kAhead) {
      if (keeps) {
        if constexpr (kPlain) {
          *reinterpret_cast<float4*>(kept) = {h[0][0], h[0][1], h[0][2], h[0][3]};
        } else {
          StoreKept<kExact>(kept, count[0], s, h[0]);
        }
      }
      uint32_t cs[4];
      LoadMatrices(cs, bc_row + offset + static_cast<uint32_t>(sizeof(stage.inputs.b)));
      Decays(decay[1], dts + dt_row + 4, a2[0]), InputsOfQuad(input[1], dtx, bs, 0, 1, s);
      FourSteps<false>(sum, h[0], decay[0], input[0], cs, 0, s);
      Decays(decay[0], dts + dt_row + 8, a2[0]), InputsOfQuad(input[0], dtx, bs, 1, 0, s);
      FourSteps<false>(sum, h[0], decay[1], input[1], cs, 1, s);
      const int next_row = dt_rows - dt_row;
      prepare(next, next_row);
      __syncwarp();
      Decays(decay[1], dts + dt_row + 12, a2[0]), InputsOfQuad(input[1], dtx, bs, 1, 1, s);
      FourSteps<false>(sum, h[0], decay[0], input[0], cs, 2, s);
      round_dtx();
      const unsigned next_stage = static_cast<unsigned>(next) % kStages;
      LoadTransposed(bs, bc_row + next_stage * static_cast<uint32_t>(sizeof(stage)));
      Decays(decay[0], dts + next_row, a2[0]), InputsOfQuad(input[0], dtx, bs, 0, 0, s);
      FourSteps<false>(sum, h[0], decay[1], input[1], cs, 3, s);
    } else {
#pragma unroll 1
      for (int q = 0; q < kGroups; ++q) {
        if (keeps) StoreKept<kExact>(kept + 16 * q, count[q], s, h[q]);
        if constexpr (kExact) {
          ExactSteps<S>(sum, h[q], a2[q], stage.inputs, dts + dt_row, dtxs + dt_row, q, s);
        } else {
          uint32_t cs[4];
          LoadTransposed(bs, bc_row + offset + 32 * q);
          LoadMatrices(cs,
                       bc_row + offset + 32 * q + static_cast<uint32_t>(sizeof(stage.inputs.b)));
#pragma unroll
          for (int quad = 0; quad < 4; ++quad) {
            Decays(decay[0], dts + dt_row + 4 * quad, a2[q]);
            InputsOfQuad(input[0], dtx, bs, quad / 2, quad % 2, s);
            FourSteps<true>(sum, h[q], decay[0], input[0], cs, quad, s);
          }
        }
      }
      prepare(next, dt_rows - dt_row);
      __syncwarp();
    }
    kept += kept_step;
    dt_row = dt_rows - dt_row;

    float y[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) y[v] = fmaf(d, x[v], sum[v]) * gate[v];
    if constexpr (kExact) {
#pragma unroll
      for (int v = 0; v < 4; ++v) stage.tile[2][columns + g + TokenOf(v, s) * kRow] = y[v];
    } else {
      StoreTransposed(z_row + offset, y);
    }
    __syncwarp();
    if (lane == 0) stage.done.Arrive();
  }
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    StoreState<kPlain, kExact>(Offset(args.final_state, b * state_size + own + 16 * q), count[q], s,
                               h[q]);
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
