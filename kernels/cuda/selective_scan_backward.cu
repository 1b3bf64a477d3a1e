// The selective scan's backward. Chunks from the last to the first; each starts from the state that
// the forward kept, recomputes its 16 states, held in registers with the decays, and then runs
// back. Per warp and chunk: 1100 instructions, of them 512 of states and decays, 76 special
// functions, 52 matrix products, 68 transpositions; about 100 passes of shared memory.
//
// Learned on an H200 (bf16, N 16). What is once per token is computed a chunk ahead, in the middle
// of the way back, where states and decays no longer needed leave registers. One warp a scheduler
// takes 2500 cycles a chunk (B1 T4096 I4096: 0.360 ms); two, all that fit with 232 registers each,
// take 4600 (B2 0.685, B4 1.367 ms): 1.2 million of 2.36 million cycles issue; a warp's others
// are the other warp's (19 %), register ports (15), latencies of fixed length (15), of shared
// memory and special functions (12 and 6). For B4 in 1.25 ms a third warp would have to fit, with
// half of the states recomputed. No gain: decays computed again (two warps), what is once per token
// by the helpers. On an H100 (B4 I4096, 1.316 ms in that run) nothing single binds: without the
// transpositions 1.280, without the sums over states 1.268, without both and the sums over channels
// 1.245, without the decays' special functions 1.322 (all of them wrong results): most is its
// float arithmetic, 544 instructions, and their latencies for two warps.
//
// Sums over states of rounded values (aligned rows of 16 states) take half the products: on an
// H100, before and after in turns, B4 I8192 2.67 to 2.53 ms, B4 I4096 1.36 to 1.28, B2 0.69 to
// 0.65, B1 0.363 to 0.338. Their error then is at most 1.45 roundings of the result; of a single
// state it would be 2.01. Two thirds of a warp's time go to the dispatcher: it issues (30 %), the
// other warp does (21), ports of registers (14). No gain beside it (B4 I8192): chunks in pairs
// (2.50), the next chunk's first loads, decays and inputs four tokens ahead (2.55 to 2.68), weights
// of the sums over channels from shared memory in place of masks, 26 instructions less (2.66);
// states or gradients carried on by matrix products, whose latency is then in the chain
// (3.17, 2.59).
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/selective_scan.cuh"
#include "kernels/cuda/selective_scan_math.cuh"

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

template <typename S>
struct BackwardShared {
  struct Stage {
    alignas(16) typename S::T tile[4][Tiles<S>::kSize];  // in, then out
    ChunkInputs<S, !S::kExact> inputs;
    alignas(16) float kept[S::kPlain ? S::kColumns * 16 : 4];
    alignas(16) float sums[S::kWarps][S::kGroups][kBcSums];
    Barrier full, done;  // 33 arrivals per helper; one per computing warp
  };
  Stage stages[kStages];
  // Of two chunks: dt as the decay takes it, the gradient of s, and dt x (f32 only).
  alignas(16) float dt[S::kWarps][2][kWarpChannels][kPitch];
  alignas(16) float ds[S::kWarps][2][kWarpChannels][kPitch];
  alignas(16) float dtx[S::kExact ? S::kWarps : 1][2][kWarpChannels][kPitch];
  InputFetcher<S, !S::kExact> fetcher;
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
  auto& fetcher = shared.fetcher;
  if (helper == 0) {
    for (int i = 0; i < fetcher.kAhead; ++i) fetcher.FetchAhead(args, b, last - i, lane);
  }
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
    Tile::Fetch(stage.tile[helper], in, from, args, b, k * kSteps, c0, lane);
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
    if (helper == 0) {
      fetcher.FetchAhead(args, b, k - fetcher.kAhead, lane);
      fetcher.Fetch(&stage.inputs, args, b, k, lane);
    }
    stage.full.ArriveAfterFetches();
    __syncwarp();
    if (lane == 0) stage.full.Arrive();
  }
}

// Moves registers from the helpers to the computing warps.
template <typename S>
__device__ void LimitRegisters(bool computes) {
  if constexpr (S::kWarps == 8) {
    if (computes) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    } else {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    BackwardKernel(const __grid_constant__ BackwardArgs<typename S::T> args) {
  using T = typename S::T;
  using Shared = BackwardShared<S>;
  using Tile = Tiles<S>;
  constexpr bool kExact = S::kExact, kPlain = S::kPlain;
  constexpr int kRow = Tile::kRow, kGroups = S::kGroups;
  extern __shared__ __align__(16) char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int b = blockIdx.x / args.channel_blocks, block = blockIdx.x % args.channel_blocks;
  InitBarriers<S>(shared.stages);
  if (warp >= S::kWarps) {
    LimitRegisters<S>(false);
    return Help<S>(shared, args, b, block, warp - S::kWarps, lane);
  }
  LimitRegisters<S>(true);
  int g = lane / 4, s = lane % 4;
  Keep(g), Keep(s);
  const int columns = warp * kWarpChannels, channel = block * S::kColumns + columns + g;
  const bool exists = channel < args.channels;
  const float d = exists ? args.d[channel] : 0.0f, bias = exists ? args.dt_bias[channel] : 0.0f;
  const int64_t state_size = static_cast<int64_t>(args.channels) * args.states;
  const int64_t own = static_cast<int64_t>(channel) * args.states;  // within a state
  float a2[kGroups][4], carry[kGroups][4], da[kGroups][4];
  int count[kGroups];  // of the channel's states from a group's first on
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    count[q] = exists ? args.states - 16 * q : 0;
    LoadState<kPlain, kExact>(carry[q], Offset(args.d_final_state, b * state_size + own + 16 * q),
                              count[q], s);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = StateOf<kExact>(j, s);
      a2[q][j] = DecayRate(args.a_log, n < count[q], own + 16 * q + n);
      da[q][j] = 0.0f;
    }
  }
  float dd = 0.0f, d_bias = 0.0f;
  const int last = args.chunks - 1;
  const float* kept = args.kept_states + static_cast<int64_t>(b) * args.chunks * state_size + own;

  // This lane's rows in LoadTransposed(): of x, or of dt_raw in the upper half of a warp, z and dy
  // two tiles on; of B. Its channel's row in shared.dt and so on, which alternates.
  auto& first = shared.stages[0];
  uint32_t tile_row = SharedAddress(first.tile[lane / 16] + lane % 16 * kRow + columns);
  uint32_t b_row = SharedAddress(first.inputs.b[lane / 16 * 8 + lane % 8]) + lane / 8 % 2 * 16;
  int dt_row = (warp * 2 * kWarpChannels + g) * kPitch;
  int dt_rows = 2 * dt_row + kWarpChannels * kPitch;  // the sum of the two
  uint32_t masks[4];                                  // all bits where g / 2 is the index
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    masks[i] = g / 2 == i ? ~0u : 0;
    if (!kExact) Keep(masks[i]);
  }
  Keep(tile_row), Keep(b_row), Keep(dt_row), Keep(dt_rows);
  constexpr uint32_t kTwoTiles = 2 * Tile::kSize * sizeof(T);
  float* const dts = &shared.dt[0][0][0][0];
  float* const dss = &shared.ds[0][0][0][0];
  float* const dtxs = &shared.dtx[0][0][0][0];

  // What belongs to a token and channel; computed a chunk ahead. dz lacks a factor s.
  struct Prepared {
    float x[4], dt[4], ds[4], dz[4], gate[4];
  };
  const auto prepare = [&](Prepared& to, int k, unsigned stage_index, int row) {
    auto& stage = shared.stages[stage_index];
    float dt_raw[4], z[4], dy[4];
    if constexpr (kExact) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int at = columns + g + TokenOf(v, s) * kRow;
        to.x[v] = stage.tile[0][at], dt_raw[v] = stage.tile[1][at];
        z[v] = stage.tile[2][at], dy[v] = stage.tile[3][at];
      }
    } else {
      const uint32_t at = tile_row + stage_index * static_cast<uint32_t>(sizeof(stage));
      uint32_t x_dt[4], z_dy[4];
      LoadTransposed(x_dt, at), LoadTransposed(z_dy, at + kTwoTiles);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const auto half = [&](uint32_t two) {
          return v % 2 == 0 ? LowerHalf(two) : UpperHalf(two);
        };
        to.x[v] = half(x_dt[v / 2]), dt_raw[v] = half(x_dt[2 + v / 2]);
        z[v] = half(z_dy[v / 2]), dy[v] = half(z_dy[2 + v / 2]);
      }
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      to.dt[v] = Softplus<kExact>(dt_raw[v] + bias);
      const float sigmoid = Sigmoid<kExact>(z[v]);
      to.gate[v] = z[v] * sigmoid;
      to.ds[v] = dy[v] * to.gate[v];
      to.dz[v] = dy[v] * fmaf(to.gate[v], 1.0f - sigmoid, sigmoid);
    }
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int at = row + TokenOf(v, s);
      *reinterpret_cast<float2*>(dts + at) = {to.dt[v], to.dt[v + 1]};
      *reinterpret_cast<float2*>(dss + at) = {to.ds[v], to.ds[v + 1]};
      if (kExact) {
        *reinterpret_cast<float2*>(dtxs + at) = {to.dt[v] * to.x[v], to.dt[v + 1] * to.x[v + 1]};
      }
    }
    const uint32_t cuts = stage.inputs.cuts;
    if (cuts != 0) AdjustDecay(to.dt, dts + row, s, args.time - k * kSteps, cuts);
  };
  Prepared now, next;
  shared.stages[0].full.Wait(0);
  prepare(next, last, 0, dt_row);
  __syncwarp();

  bool next_is_full = false;
#pragma unroll 1
  for (int i = 0; i <= last; ++i) {
    const int k = last - i;
    const unsigned stage_index = static_cast<unsigned>(i) % kStages;
    auto& stage = shared.stages[stage_index];
    const uint32_t offset = stage_index * static_cast<uint32_t>(sizeof(stage));
    // Beyond the last chunk there is nothing to wait for and nothing of use.
    const unsigned next_index = static_cast<unsigned>(i + 1) % kStages;
    auto& stage_of_next = shared.stages[next_index];
    now = next;
    float dtx[4], own_dtx[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      dtx[v] = now.dt[v] * now.x[v];
      own_dtx[v] = RoundTf32(dtx[v]);
    }

    float sum[4] = {}, d_dtx[4] = {}, d_dt[4] = {};  // of this lane's tokens
    const auto write_y = [&] {
      float dz[4], y[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float total = fmaf(d, now.x[v], sum[v]);
        dz[v] = now.dz[v] * total, y[v] = now.gate[v] * total;
      }
      if constexpr (kExact) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int at = columns + g + TokenOf(v, s) * kRow;
          stage.tile[2][at] = dz[v], stage.tile[3][at] = y[v];
        }
      } else {
        StoreTransposed(tile_row + offset + kTwoTiles, dz, y);
      }
    };
#pragma unroll 1
    for (int q = 0; q < kGroups; ++q) {
      float* sums = stage.sums[warp][q] + 4 * lane;
      uint32_t bs[4], cs[4];
      if constexpr (!kExact) {
        LoadTransposed(bs, b_row + offset + 32 * q);
        LoadMatrices(cs, b_row + offset + 32 * q + static_cast<uint32_t>(sizeof(stage.inputs.b)));
      }
      // Forward: states h[t + 1] after token t, y, and dc.
      float h[kSteps + 1][4], decay[kSteps][4];
      if constexpr (kPlain) {
        const auto start = Load<4>(stage.kept + 16 * (columns + g) + 4 * s);
#pragma unroll
        for (int j = 0; j < 4; ++j) h[0][j] = start.v[j];
      } else {
        LoadKept<kExact>(h[0], kept + k * state_size + 16 * q, count[q], s);
      }
      SumOverChannels<kExact> dc(now.ds, g);
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const int half = quad / 2;
        const auto dt4 = Load<4>(dts + dt_row + 4 * quad);
        float input[4][4];
        if constexpr (kExact) {
          const auto dtx4 = Load<4>(dtxs + dt_row + 4 * quad);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const auto bt = Load<4>(stage.inputs.b[4 * quad + m] + 16 * q + 4 * s);
#pragma unroll
            for (int j = 0; j < 4; ++j) input[m][j] = bt.v[j] * dtx4.v[m];
          }
        } else {
          InputsOfQuad(input, own_dtx, bs, half, quad % 2, s);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int t = 4 * quad + m, pair = quad % 2 * 2 + m / 2;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            decay[t][j] = Decay<kExact>(dt4.v[m] * a2[q][j]);
            h[t + 1][j] = fmaf(decay[t][j], h[t][j], input[m][j]);
          }
          if constexpr (kExact) {
            const auto ct = Load<4>(stage.inputs.c[t] + 16 * q + 4 * s);
            float part = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) part = fmaf(ct.v[j], h[t + 1][j], part);
            part = QuadSum(part);
            if (s == pair) sum[2 * half + m % 2] += part;
            dc.AddExact(h[t + 1], dss[dt_row + t], t, g);
          } else if (m % 2 == 1) {
            uint32_t packed[4];
            PackPair(packed, h[t], h[t + 1]);
            float two[4];
            if constexpr (kPlain) {
              SumOverStates(two, packed, cs, half);
            } else {
              SumOverStates(two, h[t], h[t + 1], WeightsOf(cs, half));
            }
            if (s == pair) {
              sum[2 * half] = kGroups == 1 ? two[0] : sum[2 * half] + two[0];
              sum[2 * half + 1] = kGroups == 1 ? two[3] : sum[2 * half + 1] + two[3];
            }
            dc.AddPair(packed, t / 2, masks[pair]);
          }
        }
      }
      dc.Store(sums + kBcSums / 2);
      if (kGroups == 1) write_y();

      // Backward: carry is the gradient of the state before token t + 1.
      float da_chunk[4] = {}, dt_sums[2][4] = {};
      SumOverChannels<kExact> db(dtx, g);
      uint32_t rows[4];
      if constexpr (!kExact) LoadMatrices(rows, b_row + offset + 32 * q);
#pragma unroll
      for (int quad = 3; quad >= 0; --quad) {
        const int half = quad / 2;
        if (kGroups == 1 && quad == 1) {
          if (!next_is_full && i < last) stage_of_next.full.Wait((i + 1) / kStages);
          prepare(next, k - 1, next_index, dt_rows - dt_row);
        }
        const auto dt4 = Load<4>(dts + dt_row + 4 * quad), ds4 = Load<4>(dss + dt_row + 4 * quad);
        float grad[4][4], part[4];
#pragma unroll
        for (int m = 3; m >= 0; --m) {
          const int t = 4 * quad + m, pair = quad % 2 * 2 + m / 2;
          const float* of_token = kExact ? reinterpret_cast<const float*>(stage.inputs.c[t])
                                         : stage.inputs.c_floats[kExact ? 0 : t];
          const auto ct = Load<4>(of_token + 16 * q + 4 * s);
          part[m] = 0.0f;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            grad[m][j] = fmaf(ds4.v[m], ct.v[j], carry[q][j]);
            carry[q][j] = decay[t][j] * grad[m][j];
            const float product = carry[q][j] * h[t][j];
            part[m] = fmaf(a2[q][j], product, part[m]);
            da_chunk[j] = fmaf(dt4.v[m], product, da_chunk[j]);
          }
          if constexpr (kExact) {
            const auto bt = Load<4>(stage.inputs.b[t] + 16 * q + 4 * s);
            float x_part = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) x_part = fmaf(bt.v[j], grad[m][j], x_part);
            const float of_dtx = QuadSum(x_part), of_dt = QuadSum(part[m]);
            if (s == pair) d_dtx[2 * half + m % 2] += of_dtx, d_dt[2 * half + m % 2] += of_dt;
            db.AddExact(grad[m], dtxs[dt_row + t], t, g);
          } else if (m % 2 == 0) {
            uint32_t packed[4];
            PackPair(packed, grad[m], grad[m + 1]);
            float two[4];
            if constexpr (kPlain) {
              SumOverStates(two, packed, rows, half);
            } else {
              SumOverStates(two, grad[m], grad[m + 1], WeightsOf(rows, half));
            }
            if (s == pair) {
              d_dtx[2 * half] = kGroups == 1 ? two[0] : d_dtx[2 * half] + two[0];
              d_dtx[2 * half + 1] = kGroups == 1 ? two[3] : d_dtx[2 * half + 1] + two[3];
            }
            db.AddPair(packed, t / 2, masks[pair]);
          }
        }
        // As in SumOverStates, but four tokens at once: the second operand's columns select.
        if constexpr (!kExact) {
          constexpr uint32_t kOne = 0x3f800000;
          MmaTf32(dt_sums[half], part[0], part[1], part[2], part[3],
                  __uint_as_float(masks[quad % 2 * 2] & kOne),
                  __uint_as_float(masks[quad % 2 * 2 + 1] & kOne));
        }
      }
      if constexpr (!kExact) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          d_dt[2 * half] += dt_sums[half][0], d_dt[2 * half + 1] += dt_sums[half][3];
        }
      }
      db.Store(sums);
#pragma unroll
      for (int j = 0; j < 4; ++j) da[q][j] += da_chunk[j];
    }
    if (kGroups > 1) {
      write_y();
      if (!next_is_full && i < last) stage_of_next.full.Wait((i + 1) / kStages);
      prepare(next, k - 1, next_index, dt_rows - dt_row);
    }

    float dx[4], d_raw[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      dx[v] = fmaf(d_dtx[v], now.dt[v], now.ds[v] * d);
      d_raw[v] = fmaf(d_dtx[v], now.x[v], d_dt[v] * kLn2) * SoftplusSlope<kExact>(now.dt[v]);
      dd = fmaf(now.ds[v], now.x[v], dd);
      d_bias += d_raw[v];
    }
    if constexpr (kExact) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int at = columns + g + TokenOf(v, s) * kRow;
        stage.tile[0][at] = dx[v], stage.tile[1][at] = d_raw[v];
      }
    } else {
      StoreTransposed(tile_row + offset, dx, d_raw);
    }
    dt_row = dt_rows - dt_row;
    __syncwarp();
    if (lane == 0) stage.done.Arrive();
    next_is_full =
        shared.stages[static_cast<unsigned>(i + 2) % kStages].full.Done((i + 2) / kStages);
  }
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    const int64_t at = b * state_size + own + 16 * q;
    StoreState<kPlain, kExact>(Offset(args.d_initial_state, at), count[q], s, carry[q]);
    StoreState<kPlain, kExact>(args.a_partial + at, count[q], s, da[q]);
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
    const auto launch = [&](auto shape) {
      using S = decltype(shape);
      KRAIT_CHECK(S::kColumns == width);
      Launch("SelectiveScanBackward", BackwardKernel<S>, batch * args.channel_blocks, S::kThreads,
             static_cast<int64_t>(sizeof(BackwardShared<S>)), ctx, args);
    };
    if (args.states > 16) {
      launch(Shape<T, 4, 4, false>());
    } else if constexpr (std::is_same_v<T, float>) {
      launch(Shape<T, 4, 1, false>());
    } else if (width == 32) {
      plain ? launch(Shape<T, 4, 1, true>()) : launch(Shape<T, 4, 1, false>());
    } else {
      plain ? launch(Shape<T, 8, 1, true>()) : launch(Shape<T, 8, 1, false>());
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
