// The selective scan's backward. Chunks from the last to the first; each starts from the state that
// the forward kept, recomputes its 16 states, held in registers with the decays, and then runs
// back. Per warp and chunk: 1230 instructions, 84 special functions, 340 passes of shared memory.
//
// Learned on an H200 (B 2, T 4096, I 4096, N 16, bf16; 0.69 ms, of which the sums 0.02): the zero
// columns of the products for db and dc come from memory, since selecting them by the token spilled
// predicates. Helpers that move data: 0.97 to 0.73 ms. No gain: decays computed again (0.75; 0.84
// with two states a lane and twice the warps), what is done once per token a chunk ahead (0.75 to
// 0.77: spills) or by the helpers (1.3), and B dt x as outer products on top of that (0.77).
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/selective_scan.cuh"

namespace krait::cuda {
namespace {

// Floats that a warp adds to db and dc of 16 tokens and 16 states: 4 quarters (db, dc of tokens 0-7
// and 8-15 each) of 4 floats a lane.
constexpr int kBcSums = 512;
constexpr int kStages = 4;  // chunks in flight

template <typename T>
struct BackwardArgs : ScanArgs<T> {
  TokenRows<const T> in[4];  // x, dt_raw, z, dy
  TokenRows<T> out[4];       // dx, d_dt_raw, dz, y
  const float *kept_states, *d_final_state;
  float* d_initial_state;
  float* bc_partial;                            // [channel_blocks][B][chunks][kGroups][kBcSums]
  float *a_partial, *d_partial, *bias_partial;  // [B][I][N], [B][I], [B][I]
};

__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// An 8x8 matrix of pairs of bf16 (row = lane / 4, columns 2 (lane % 4), +1), transposed.
__device__ inline uint32_t Transpose(uint32_t rows) {
  uint32_t columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}
// a b, m16n8k16.
__device__ inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// A weight per token of a chunk and channel of a warp as the second operand of SumOverChannels:
// [token % 2][pair of channels][token / 2][channel % 2]. The padding parts the banks.
struct ChannelWeights {
  alignas(16) BF16 of_token[2][4 * 16 + 8];
  __device__ void Set(int token, int channel, float weight) {
    of_token[token % 2][channel / 2 * 16 + token / 2 * 2 + channel % 2] = FromFloat<BF16>(weight);
  }
};

// The sums over a warp's channels of weights times a value per state, for 16 tokens.
//
// bf16: the values of tokens t, t+1, rounded and transposed so that the channels run along the
// contraction, token t's in its first half, t+1's in the second. The second operand has token t's
// weights in its columns 0-3 and t+1's in 4-7, so that lanes s = 0, 1 hold the sums of token t,
// s = 2, 3 those of t+1; of two lanes with the same sum each keeps one of two pairs of tokens.
// f32: by shuffles; lane g keeps tokens g and 8 + g.
template <bool kExact>
struct SumOverChannels {
  float sums[8];
  const uint32_t *even_weights, *odd_weights;

  __device__ SumOverChannels(const ChannelWeights& weights, const uint32_t* zeros, int g, int s) {
    if constexpr (kExact) return;
    const auto* own = reinterpret_cast<const uint32_t*>(weights.of_token[g / 4]) + s * 8;
    even_weights = g < 4 ? own : zeros, odd_weights = g < 4 ? zeros : own;
  }
  // Tokens 2 * pair and 2 * pair + 1; pairs in the order 1, 0, 3, 2, ... or 7, 6, 5, ...
  __device__ void AddPair(const float (&even)[4], const float (&odd_values)[4], int pair,
                          uint32_t even_weight, uint32_t odd_weight, int s) {
    const uint32_t a[4] = {Transpose(PackBf16(even[0], even[1])),
                           Transpose(PackBf16(even[2], even[3])),
                           Transpose(PackBf16(odd_values[0], odd_values[1])),
                           Transpose(PackBf16(odd_values[2], odd_values[3]))};
    float d[4];
    MmaBf16(d, a, even_weight, odd_weight);
    // Whichever of pairs 2m and 2m + 1 comes first is overwritten where it is not this lane's.
    const int first = pair / 2 * 2;
    if (s % 2 == pair % 2) sums[first] = d[0], sums[first + 1] = d[2];
  }
  __device__ void AddExact(const float (&value)[4], float weight, int token, int g) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sum = value[j] * weight;
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (g == token % 8) sums[token / 8 * 4 + j] = sum;
    }
  }
  // To quarters of 128 floats, of which a lane has four.
  __device__ void Store(float* to) const {
    *reinterpret_cast<float4*>(to) = {sums[0], sums[1], sums[2], sums[3]};
    *reinterpret_cast<float4*>(to + 128) = {sums[4], sums[5], sums[6], sums[7]};
  }
};
// The token (of 16) and state of element e of a warp's sums (kBcSums).
struct TokenAndState {
  int token, state;
};
template <bool kExact>
__device__ inline TokenAndState BcElement(int e) {
  const int half = e / 128 % 2, lane = e / 4 % 32, g = lane / 4, s = lane % 4, j = e % 4;
  if constexpr (kExact) return {8 * half + g, 4 * s + j};
  const int pair = 2 * (2 * half + j / 2) + s % 2;
  return {2 * pair + s / 2, g / 2 * 4 + j % 2 * 2 + g % 2};
}

template <typename S>
struct BackwardShared {
  struct Stage {
    alignas(16) typename S::T tile[4][Tiles<S>::kSize];  // in, then out
    alignas(16) float bc[ChunkInputs<S>::kFloats];
    alignas(16) float kept[S::kPlain ? S::kColumns * 16 : 4];
    alignas(16) float sums[S::kWarps][S::kGroups][kBcSums];
    uint32_t cuts;
    Barrier full, done;  // 33 arrivals per helper; one per computing warp
  };
  Stage stages[kStages];
  alignas(16) float dt[S::kWarps][kWarpChannels][kPitch];   // as the decay takes it
  alignas(16) float dtx[S::kWarps][kWarpChannels][kPitch];  // dt * x
  alignas(16) float ds[S::kWarps][kWarpChannels][kPitch];   // gradient of s
  ChannelWeights of_dtx[S::kWarps], of_ds[S::kWarps];       // bf16: the same two
  alignas(16) uint32_t zeros[8];
};

// A helper's part: one of the four tensors in and out, a quarter of the kept states and of the sums
// over the block's warps, in order; the first also B, C and documents.
template <typename S>
__device__ void Help(BackwardShared<S>& shared, const BackwardArgs<typename S::T>& args, int b,
                     int block, int helper, int lane) {
  using T = typename S::T;
  using Tile = Tiles<S>;
  const int c0 = block * S::kColumns, last = args.chunks - 1;
  const TokenRows<const T>& from = args.in[helper];
  const TokenRows<T>& to = args.out[helper];
  const T* in = Tile::Start(from, b, last * kSteps, c0, lane);
  T* out = Tile::Start(to, b, last * kSteps, c0, lane);
  constexpr int kQuarter = S::kGroups * kBcSums / 4;
  const int64_t batch = gridDim.x / args.channel_blocks;
  float* bc = args.bc_partial + ((block * batch + b) * args.chunks + last) * (4 * kQuarter) +
              helper * kQuarter;
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  const float* kept =
      args.kept_states + (static_cast<int64_t>(b) * args.chunks + last) * state_size;
  ChunkInputs<S> inputs;
  if (helper == 0) inputs.Fetch(args, b, last * kSteps, lane);
#pragma unroll 1
  for (int i = 0; i < args.chunks + kStages; ++i) {
    auto& stage = shared.stages[i % kStages];
    const int k = last - i;
    if (i >= kStages) {
      stage.done.Wait(i / kStages - 1);
      if (to.data != nullptr) {
        Tile::Write(stage.tile[helper], out, to, args, b, (k + kStages) * kSteps, c0, lane);
        out -= static_cast<int64_t>(to.row) * kSteps;
      }
#pragma unroll
      for (int e = 4 * lane; e < kQuarter; e += 128) {
        const float* sums = &stage.sums[0][0][0] + helper * kQuarter + e;
        float4 sum = *reinterpret_cast<const float4*>(sums);
#pragma unroll
        for (int w = 1; w < S::kWarps; ++w) {
          const float4 more = *reinterpret_cast<const float4*>(sums + w * 4 * kQuarter);
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        *reinterpret_cast<float4*>(bc + e) = sum;
      }
      bc -= 4 * kQuarter;
      __syncwarp();
    }
    if (k < 0) continue;
    const int t0 = k * kSteps;
    Tile::Fetch(stage.tile[helper], in, from, args, b, t0, c0, lane);
    in -= static_cast<int64_t>(from.row) * kSteps;
    if constexpr (S::kPlain) {
      constexpr int kFloats = S::kColumns * 4;  // of a quarter
#pragma unroll
      for (int e = 4 * lane; e < kFloats; e += 128) {
        const int at = helper * kFloats + e;
        if (c0 + at / 16 >= args.channels) continue;
        FetchAsync(reinterpret_cast<Pack<float, 4>*>(stage.kept + at), kept + c0 * 16 + at);
      }
      kept -= state_size;
    }
    if (helper == 0) inputs.Put(stage.bc, &stage.cuts, args, b, t0, lane);
    stage.full.ArriveAfterFetches();
    __syncwarp();
    if (lane == 0) stage.full.Arrive();
    if (helper == 0 && k > 0) inputs.Fetch(args, b, t0 - kSteps, lane);
  }
}

// Moves registers from the helpers to the computing warps.
template <typename S, bool kKeepDecay>
__device__ void LimitRegisters(bool computes) {
  if constexpr (S::kWarps == 8 && kKeepDecay) {
    if (computes) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    } else {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    }
  }
}

template <typename S, int kBlocks, bool kKeepDecay>
__global__ void __launch_bounds__(S::kThreads, kBlocks)
    BackwardKernel(const __grid_constant__ BackwardArgs<typename S::T> args) {
  using T = typename S::T;
  using Shared = BackwardShared<S>;
  using Tile = Tiles<S>;
  constexpr bool kExact = S::kExact, kPlain = S::kPlain;
  constexpr int kRow = Tile::kRow, kStates = S::kStates, kGroups = S::kGroups;
  extern __shared__ __align__(16) char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, s = lane % 4;
  const int b = blockIdx.x / args.channel_blocks, block = blockIdx.x % args.channel_blocks;
  const int in_block = warp * kWarpChannels + g, channel = block * S::kColumns + in_block;
  if (threadIdx.x < 8) shared.zeros[threadIdx.x] = 0;
  InitBarriers<S>(shared.stages);
  if (warp >= S::kWarps) {
    LimitRegisters<S, kKeepDecay>(false);
    return Help<S>(shared, args, b, block, warp - S::kWarps, lane);
  }
  LimitRegisters<S, kKeepDecay>(true);
  const bool exists = channel < args.channels;
  const float d = exists ? args.d[channel] : 0.0f, bias = exists ? args.dt_bias[channel] : 0.0f;
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  const int64_t own = static_cast<int64_t>(channel) * args.states + 4 * s;  // within a state
  float a2[kGroups][4], carry[kGroups][4], da[kGroups][4];
  int count[kGroups];  // of the lane's states that exist
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    count[q] = exists ? args.states - 16 * q - 4 * s : 0;
    const float4 last =
        LoadState<kPlain>(Offset(args.d_final_state, b * state_size + own + 16 * q), count[q]);
    carry[q][0] = last.x, carry[q][1] = last.y, carry[q][2] = last.z, carry[q][3] = last.w;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a2[q][j] = DecayRate(args.a_log, j < count[q], own + 16 * q + j);
      da[q][j] = 0.0f;
    }
  }
  float dd = 0.0f, d_bias = 0.0f;

  const int last = args.chunks - 1;
  const float* kept = args.kept_states + static_cast<int64_t>(b) * args.chunks * state_size + own;
  float* dts = shared.dt[warp][g];
  float* dtxs = shared.dtx[warp][g];
  float* dss = shared.ds[warp][g];

  bool is_full = false;
#pragma unroll 1
  for (int i = 0; i <= last; ++i) {
    const int k = last - i, next = min(i + 1, last);
    auto& stage = shared.stages[i % kStages];
    if (!is_full) stage.full.Wait(i / kStages);
    __syncwarp();
    is_full = shared.stages[next % kStages].full.Done(next / kStages);
    const int steps = args.time - k * kSteps;

    // What belongs to a token and channel.
    float x[4], dt[4], slope[4], ds[4], dz[4], gate[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int at = in_block + TokenOf(v, s) * kRow;
      x[v] = ToFloat(stage.tile[0][at]);
      const auto softplus = Softplus<kExact>(ToFloat(stage.tile[1][at]) + bias);
      dt[v] = softplus.value, slope[v] = softplus.slope;
      const float z = ToFloat(stage.tile[2][at]), sigmoid = Sigmoid<kExact>(z);
      const float dy = ToFloat(stage.tile[3][at]);
      gate[v] = z * sigmoid;
      ds[v] = dy * gate[v];
      dz[v] = dy * fmaf(gate[v], 1.0f - sigmoid, sigmoid);  // times s, to come
    }
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int t = TokenOf(v, s);
      *reinterpret_cast<float2*>(dts + t) = {dt[v], dt[v + 1]};
      *reinterpret_cast<float2*>(dtxs + t) = {dt[v] * x[v], dt[v + 1] * x[v + 1]};
      *reinterpret_cast<float2*>(dss + t) = {ds[v], ds[v + 1]};
    }
    if constexpr (!kExact) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        shared.of_dtx[warp].Set(TokenOf(v, s), g, dt[v] * x[v]);
        shared.of_ds[warp].Set(TokenOf(v, s), g, ds[v]);
      }
    }
    const uint32_t cuts = stage.cuts;
    if (steps < kSteps || cuts != 0) AdjustDecay(dts, s, steps, cuts);
    __syncwarp();

    const float* bs = stage.bc + 4 * s;
    const float* cs = bs + kSteps * kStates;
    float sum[4] = {}, d_dtx[4] = {}, d_dt[4] = {};  // of this lane's tokens
#pragma unroll 1
    for (int q = 0; q < kGroups; ++q) {
      float* sums = stage.sums[warp][q] + 4 * lane;
      // Forward: states h[t + 1] after token t, y, and dc.
      float h[kSteps + 1][4], decay[kSteps][4];
      const float4 start =
          kPlain ? *reinterpret_cast<const float4*>(stage.kept + 16 * in_block + 4 * s)
                 : LoadState<kPlain>(kept + k * state_size + 16 * q, count[q]);
      h[0][0] = start.x, h[0][1] = start.y, h[0][2] = start.z, h[0][3] = start.w;
      SumOverChannels<kExact> dc(shared.of_ds[warp], shared.zeros, g, s);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto even_weights = Load<4>(dc.even_weights + 4 * half);
        const auto odd_weights = Load<4>(dc.odd_weights + 4 * half);
        const auto weights = Load<4>(cs + (8 * half + g) * kStates + 16 * q);
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
          const int first = 8 * half + 4 * quad;
          const auto dt4 = Load<4>(dts + first), dtx4 = Load<4>(dtxs + first);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int t = first + m, pair = 2 * quad + m / 2;
            const auto bt = Load<4>(bs + t * kStates + 16 * q);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              decay[t][j] = Decay<kExact>(dt4.v[m] * a2[q][j]);
              h[t + 1][j] = fmaf(decay[t][j], h[t][j], bt.v[j] * dtx4.v[m]);
            }
            if constexpr (kExact) {
              const auto ct = Load<4>(cs + t * kStates + 16 * q);
              float part = 0.0f;
#pragma unroll
              for (int j = 0; j < 4; ++j) part = fmaf(ct.v[j], h[t + 1][j], part);
              part = QuadSum(part);
              if (s == pair) sum[2 * half + m % 2] += part;
              dc.AddExact(h[t + 1], dss[t], t, g);
            } else if (m % 2 == 1) {
              float two[4];
              SumOverStates(two, h[t], h[t + 1],
                            {weights.v[0], weights.v[1], weights.v[2], weights.v[3]});
              if (s == pair) {
                sum[2 * half] = kGroups == 1 ? two[0] : sum[2 * half] + two[0];
                sum[2 * half + 1] = kGroups == 1 ? two[3] : sum[2 * half + 1] + two[3];
              }
              dc.AddPair(h[t], h[t + 1], t / 2, even_weights.v[pair], odd_weights.v[pair], s);
            }
          }
        }
      }
      dc.Store(sums + kBcSums / 2);

      // Backward: carry is the gradient of the state before token t + 1.
      float da_chunk[4] = {};
      SumOverChannels<kExact> db(shared.of_dtx[warp], shared.zeros, g, s);
#pragma unroll
      for (int half = 1; half >= 0; --half) {
        const auto even_weights = Load<4>(db.even_weights + 4 * half);
        const auto odd_weights = Load<4>(db.odd_weights + 4 * half);
        const auto weights = Load<4>(bs + (8 * half + g) * kStates + 16 * q);
        float dt_sums[4] = {};
#pragma unroll
        for (int quad = 1; quad >= 0; --quad) {
          const int first = 8 * half + 4 * quad;
          const auto dt4 = Load<4>(dts + first), ds4 = Load<4>(dss + first);
          float grad[4][4], part[4];
#pragma unroll
          for (int m = 3; m >= 0; --m) {
            const int t = first + m, pair = 2 * quad + m / 2;
            const auto ct = Load<4>(cs + t * kStates + 16 * q);
            part[m] = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              grad[m][j] = fmaf(ds4.v[m], ct.v[j], carry[q][j]);
              const float a = kKeepDecay ? decay[t][j] : Decay<kExact>(dt4.v[m] * a2[q][j]);
              carry[q][j] = a * grad[m][j];
              const float product = carry[q][j] * h[t][j];
              part[m] = fmaf(a2[q][j], product, part[m]);
              da_chunk[j] = fmaf(dt4.v[m], product, da_chunk[j]);
            }
            if constexpr (kExact) {
              const auto bt = Load<4>(bs + t * kStates + 16 * q);
              float x_part = 0.0f;
#pragma unroll
              for (int j = 0; j < 4; ++j) x_part = fmaf(bt.v[j], grad[m][j], x_part);
              const float of_dtx = QuadSum(x_part), of_dt = QuadSum(part[m]);
              if (s == pair) d_dtx[2 * half + m % 2] += of_dtx, d_dt[2 * half + m % 2] += of_dt;
              db.AddExact(grad[m], dtxs[t], t, g);
            } else if (m % 2 == 0) {
              float two[4];
              SumOverStates(two, grad[m], grad[m + 1],
                            {weights.v[0], weights.v[1], weights.v[2], weights.v[3]});
              if (s == pair) {
                d_dtx[2 * half] = kGroups == 1 ? two[0] : d_dtx[2 * half] + two[0];
                d_dtx[2 * half + 1] = kGroups == 1 ? two[3] : d_dtx[2 * half + 1] + two[3];
              }
              db.AddPair(grad[m], grad[m + 1], t / 2, even_weights.v[pair], odd_weights.v[pair], s);
            }
          }
          // As in SumOverStates, but four tokens at once: the second operand's columns select.
          if constexpr (!kExact) {
            MmaTf32(dt_sums, part[0], part[1], part[2], part[3], g / 2 == 2 * quad ? 1.0f : 0.0f,
                    g / 2 == 2 * quad + 1 ? 1.0f : 0.0f);
          }
        }
        if constexpr (!kExact) d_dt[2 * half] += dt_sums[0], d_dt[2 * half + 1] += dt_sums[3];
      }
      db.Store(sums);
#pragma unroll
      for (int j = 0; j < 4; ++j) da[q][j] += da_chunk[j];
    }

#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int at = in_block + TokenOf(v, s) * kRow;
      const float total = fmaf(d, x[v], sum[v]);
      const float d_raw = fmaf(d_dtx[v], x[v], d_dt[v] * kLn2) * slope[v];
      dd = fmaf(ds[v], x[v], dd);
      d_bias += TokenOf(v, s) < steps ? d_raw : 0.0f;
      stage.tile[0][at] = FromFloat<T>(fmaf(d_dtx[v], dt[v], ds[v] * d));
      stage.tile[1][at] = FromFloat<T>(d_raw);
      stage.tile[2][at] = FromFloat<T>(dz[v] * total);
      stage.tile[3][at] = FromFloat<T>(gate[v] * total);
    }
    __syncwarp();
    if (lane == 0) stage.done.Arrive();
  }
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    const int64_t at = b * state_size + own + 16 * q;
    StoreState<kPlain>(Offset(args.d_initial_state, at), count[q], carry[q]);
    StoreState<false>(args.a_partial + at, count[q], da[q]);
  }
  dd = QuadSum(dd), d_bias = QuadSum(d_bias);
  if (exists && s == 0) {
    args.d_partial[static_cast<int64_t>(b) * args.channels + channel] = dd;
    args.bias_partial[static_cast<int64_t>(b) * args.channels + channel] = d_bias;
  }
}

template <typename T>
struct SumArgs {
  TokenRows<float> db, dc;
  float *d_a_log, *dd, *d_dt_bias;
  const float *a_log, *bc_partial, *a_partial, *d_partial, *bias_partial;
  int batch, time, channels, states, chunks, groups, channel_blocks;
  int64_t bc_blocks;  // the first blocks sum db and dc, the others the parameters
};

constexpr int kSumThreads = 256;

// db, dc: the sums over blocks of channels, in order. Parameters: over sequences, in order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) SumKernel(const __grid_constant__ SumArgs<T> args) {
  const int64_t size = static_cast<int64_t>(args.batch) * args.chunks * args.groups * kBcSums;
  if (blockIdx.x < args.bc_blocks) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
    const int e = static_cast<int>(i % kBcSums),
              group = static_cast<int>(i / kBcSums % args.groups);
    const int64_t chunk = i / kBcSums / args.groups;
    const auto [token, state] = BcElement<std::is_same_v<T, float>>(e);
    const int t = static_cast<int>(chunk % args.chunks) * kSteps + token, n = 16 * group + state;
    if (t >= args.time || n >= args.states) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int block = 0; block < args.channel_blocks; ++block)
      sum += args.bc_partial[block * size + i];
    (e < kBcSums / 2 ? args.db : args.dc).At(static_cast<int>(chunk / args.chunks), t)[n] = sum;
    return;
  }
  const int64_t i = (blockIdx.x - args.bc_blocks) * kSumThreads + threadIdx.x;
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  float sum = 0.0f;
  if (i < state_size) {
    for (int b = 0; b < args.batch; ++b) sum += args.a_partial[b * state_size + i];
    args.d_a_log[i] -= sum * expf(args.a_log[i]);  // A = -exp(A_log) is its own derivative
  } else if (i < state_size + 2 * static_cast<int64_t>(args.channels)) {
    const int64_t c = i - state_size;
    const bool of_d = c < args.channels;
    const int64_t at = of_d ? c : c - args.channels;
    const float* from = of_d ? args.d_partial : args.bias_partial;
    for (int b = 0; b < args.batch; ++b) sum += from[static_cast<int64_t>(b) * args.channels + at];
    (of_d ? args.dd : args.d_dt_bias)[at] += sum;
  }
}

}  // namespace

void SelectiveScanBackward(const SelectiveScanGradients& grad, Tensor y, Tensor dy,
                           Tensor d_final_state, Tensor kept_states, const SelectiveScanInputs& in,
                           Tensor scratch, const Context& ctx) {
  if (in.x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    BackwardArgs<T> args{};
    static_cast<ScanArgs<T>&>(args) = ScanArgsOf<T>(in);
    const Tensor from[4] = {in.x, in.dt_raw, in.z, dy};
    const Tensor to[4] = {grad.dx, grad.d_dt_raw, grad.dz, y};
    bool plain = args.states == 16;
    for (int q = 0; q < 4; ++q) {
      args.in[q] = TokenRowsOf<const T>(from[q]), args.out[q] = TokenRowsOf<T>(to[q]);
      plain = plain && AlignedRows(from[q]) && AlignedRows(to[q]);
    }
    args.kept_states = DataOf<const float>(kept_states);
    args.d_final_state = DataOf<const float>(d_final_state);
    args.d_initial_state = DataOf<float>(grad.d_initial_state);
    const int64_t batch = in.x.dim(0);
    const int64_t width = ScanBackwardChannels(in.x.dtype(), batch, args.channels, args.states);
    args.channel_blocks = static_cast<int>((args.channels + width - 1) / width);
    const int groups = args.states <= 16 ? 1 : 4;
    const int64_t sums = args.channel_blocks * batch * args.chunks * groups * kBcSums;
    const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
    args.bc_partial = DataOf<float>(scratch);
    args.a_partial = args.bc_partial + sums;
    args.d_partial = args.a_partial + batch * state_size;
    args.bias_partial = args.d_partial + batch * args.channels;
    KRAIT_CHECK(scratch.numel() >= sums + batch * (state_size + 2 * args.channels));
    const auto launch = [&](auto shape, auto blocks, auto keep_decay) {
      using S = decltype(shape);
      KRAIT_CHECK(S::kColumns == width);
      Launch("SelectiveScanBackward", BackwardKernel<S, blocks, keep_decay>,
             batch * args.channel_blocks, S::kThreads,
             static_cast<int64_t>(sizeof(BackwardShared<S>)), ctx, args);
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::bool_constant<true> keep;
    if (args.states > 16) {
      launch(Shape<T, 4, 4, false>(), one, keep);
    } else if constexpr (std::is_same_v<T, float>) {
      launch(Shape<T, 4, 1, false>(), one, keep);
    } else if (width == 32) {
      plain ? launch(Shape<T, 4, 1, true>(), one, keep)
            : launch(Shape<T, 4, 1, false>(), one, keep);
    } else {
      plain ? launch(Shape<T, 8, 1, true>(), one, keep)
            : launch(Shape<T, 8, 1, false>(), one, keep);
    }

    SumArgs<T> sum{};
    sum.db = TokenRowsOf<float>(grad.db), sum.dc = TokenRowsOf<float>(grad.dc);
    sum.d_a_log = DataOf<float>(grad.d_a_log), sum.dd = DataOf<float>(grad.dd);
    sum.d_dt_bias = DataOf<float>(grad.d_dt_bias), sum.a_log = args.a_log;
    sum.bc_partial = args.bc_partial, sum.a_partial = args.a_partial;
    sum.d_partial = args.d_partial, sum.bias_partial = args.bias_partial;
    sum.batch = static_cast<int>(batch), sum.time = args.time, sum.channels = args.channels;
    sum.states = args.states, sum.chunks = args.chunks, sum.groups = groups;
    sum.channel_blocks = args.channel_blocks;
    sum.bc_blocks = batch * args.chunks * groups * (kBcSums / kSumThreads);
    const int64_t parameters = state_size + 2 * static_cast<int64_t>(args.channels);
    Launch("SelectiveScanBackward sums", SumKernel<T>,
           sum.bc_blocks + (parameters + kSumThreads - 1) / kSumThreads, kSumThreads, 0, ctx, sum);
  };
  in.x.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

}  // namespace krait::cuda
