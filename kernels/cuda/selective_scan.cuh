// What the forward and the backward of the selective scan share: how a warp lies over channels and
// states, tiles of 16 tokens in shared memory, and the functions of one element.
//
// A warp owns 8 channels of one sequence and walks through time; lane = 4 * g + s owns channel g
// and states 2s, 2s+1, 8+2s, 9+2s (of each group of 16): the rows and columns of the matrix
// instructions' fragments. A chunk is 16 tokens. What belongs to a token and channel but to no state
// (softplus, gates, ...) is computed once, by the lane s that has tokens 2s, 2s+1, 8+2s, 9+2s of
// channel g: where the matrix instructions leave its sums.
#ifndef KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_CUH_
#define KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_CUH_

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/selective_scan.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {

inline constexpr int kSteps = static_cast<int>(kScanSteps);
inline constexpr int kWarpChannels = 8;
inline constexpr float kLog2E = 0x1.715476p0f, kLn2 = 0x1.62e430p-1f;
// Floats of a channel's 16 steps in a warp's scratch; the padding spreads channels over the banks.
inline constexpr int kPitch = 20;

// The token of lane s's value v, 0 to 3, and the state (of 16) of its element j.
__device__ inline int TokenOf(int v, int s) { return v / 2 * 8 + 2 * s + v % 2; }
__device__ inline int StateOf(int j, int s) { return j / 2 * 8 + 2 * s + j % 2; }

// A tensor [B,T,X] in device memory.
template <typename T>
struct TokenRows {
  T* data;
  int64_t batch;
  int row;
  __device__ T* At(int b, int t) const { return data + b * batch + static_cast<int64_t>(t) * row; }
};
template <typename T>
T* DataOf(const Tensor& t) {
  if (!t.defined()) return nullptr;
  KRAIT_CHECK(t.dtype() == kDTypeOf<std::remove_const_t<T>> && t.device() == Device::kCuda);
  return static_cast<T*>(t.raw());
}
template <typename T>
TokenRows<T> TokenRowsOf(const Tensor& t) {
  if (!t.defined()) return {nullptr, 0, 0};
  KRAIT_CHECK(t.stride(1) <= INT32_MAX);
  return {DataOf<T>(t), t.stride(0), static_cast<int>(t.stride(1))};
}
// Whether every row begins and ends at a 16-byte boundary.
inline bool AlignedRows(const Tensor& t) {
  const int64_t per_access = 16 / SizeOf(t.dtype());
  return !t.defined() ||
         (reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0 && t.dim(2) % per_access == 0 &&
          (t.dim(1) <= 1 || t.stride(1) % per_access == 0) &&
          (t.dim(0) <= 1 || t.stride(0) % per_access == 0));
}

// What forward and backward take alike. kept_states and initial_state: see LoadState.
template <typename T>
struct ScanArgs {
  TokenRows<const T> b, c;
  const float *a_log, *d, *dt_bias, *initial_state;
  const int32_t* doc_start;
  int64_t first_position;
  int time, channels, chunks, states, channel_blocks;
  bool aligned_bc;  // rows of b and c begin at 16-byte boundaries
};
template <typename T>
ScanArgs<T> ScanArgsOf(const SelectiveScanInputs& in) {
  ScanArgs<T> args{};
  args.b = TokenRowsOf<const T>(in.b), args.c = TokenRowsOf<const T>(in.c);
  args.a_log = DataOf<const float>(in.a_log), args.d = DataOf<const float>(in.d);
  args.dt_bias = DataOf<const float>(in.dt_bias);
  args.initial_state = DataOf<const float>(in.initial_state);
  args.doc_start = DataOf<const int32_t>(in.documents.doc_start);
  args.first_position = in.documents.first_position;
  KRAIT_CHECK(in.x.dim(1) <= INT32_MAX - kSteps && in.x.dim(2) <= INT32_MAX / 64);
  args.time = static_cast<int>(in.x.dim(1)), args.channels = static_cast<int>(in.x.dim(2));
  args.chunks = static_cast<int>(ScanStates(args.time));
  args.states = static_cast<int>(in.a_log.dim(1));
  KRAIT_CHECK(args.states >= 1 && args.states <= 64);
  args.aligned_bc = AlignedRows(in.b) && AlignedRows(in.c);
  return args;
}

// How a block lies over the data. kPlain: 16 states, aligned rows; else any of 1 to 16 * kGroups
// states, any alignment. The first kWarps warps compute, kHelpers more move data.
template <typename Element, int kWarps_, int kGroups_, bool kPlain_>
struct Shape {
  using T = Element;
  static constexpr int kWarps = kWarps_, kGroups = kGroups_, kHelpers = 4;
  static constexpr int kThreads = 32 * (kWarps + kHelpers);
  static constexpr bool kPlain = kPlain_, kExact = std::is_same_v<T, float>;
  static constexpr int kColumns = kWarpChannels * kWarps, kStates = 16 * kGroups;
  static_assert(!kPlain || kGroups == 1);
};

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A barrier in shared memory. Thread 0 initialises it, and all synchronise before its first use.
class Barrier {
 public:
  __device__ void Init(int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(this)), "r"(arrivals));
  }
  __device__ void Arrive() {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(SharedAddress(this)) : "memory");
  }
  // Arrives when this thread's FetchAsync() so far have landed.
  __device__ void ArriveAfterFetches() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(SharedAddress(this))
                 : "memory");
  }
  // Whether use number `use` has ended.
  __device__ bool Done(int use) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\tmbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
        "\tselp.b32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(SharedAddress(this)), "r"(use & 1)
        : "memory");
    return done != 0;
  }
  // Waits for the end of use number `use` (0, 1, ...).
  __device__ void Wait(int use) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "\t@!done bra again;\n\t}" ::"r"(SharedAddress(this)),
        "r"(use & 1)
        : "memory");
  }

 private:
  uint64_t bits_;
};

// Tiles: 16 tokens of the block's channels. Rows are padded so that the lanes'
// tokens lie in different banks. One warp moves them.
template <typename S>
struct Tiles {
  using T = typename S::T;
  static constexpr int kColumns = S::kColumns;
  static constexpr int kRow = kColumns + 16 / static_cast<int>(sizeof(T));
  static constexpr int kSize = kSteps * kRow;

  static constexpr int kVec = S::kPlain ? kVectorOf<T> : 1;
  static constexpr int kPerRow = kColumns / kVec, kRowsAtOnce = kPerRow < 32 ? 32 / kPerRow : 1;
  using Access = Pack<T, kVec>;

  // Where a lane of a helper stands in a tensor: at its first access to a chunk.
  template <typename U>
  static __device__ U* Start(const TokenRows<U>& rows, int b, int t0, int c0, int lane) {
    return rows.At(b, t0 + lane / kPerRow) + c0 + lane % kPerRow * kVec;
  }
  // Calls move(i, token, column) for this lane's accesses to a tensor's rows; access i is i *
  // kRowsAtOnce rows after Start().
  template <typename Move>
  static __device__ void ForEach(int lane, const Move& move) {
#pragma unroll
    for (int i = 0; i < kSteps / kRowsAtOnce; ++i) {
      move(i, i * kRowsAtOnce + lane / kPerRow, lane % kPerRow * kVec);
    }
  }
  // Whether chunk t0 of the block has all tokens and channels, so that nothing need be checked.
  static __device__ bool Whole(const ScanArgs<T>& args, int t0, int c0) {
    return S::kPlain && t0 + kSteps <= args.time && c0 + kColumns <= args.channels;
  }
  // Starts fetching tensor `from` into `tile`; what does not exist becomes zero.
  static __device__ void Fetch(T* tile, const T* start, const TokenRows<const T>& from,
                               const ScanArgs<T>& args, int b, int t0, int c0, int lane) {
    if (Whole(args, t0, c0)) {
      ForEach(lane, [&](int i, int t, int column) {
        FetchAsync(reinterpret_cast<Access*>(tile + t * kRow + column),
                   start + static_cast<int64_t>(from.row) * (i * kRowsAtOnce));
      });
      return;
    }
#pragma unroll 1
    for (int i = lane; i < kSteps * kColumns; i += 32) {
      const int column = i % kColumns, t = i / kColumns;
      const bool exists = t0 + t < args.time && c0 + column < args.channels;
      tile[t * kRow + column] = exists ? from.At(b, t0 + t)[c0 + column] : T{};
    }
  }
  // Writes a tile to device memory.
  static __device__ void Write(const T* tile, T* start, const TokenRows<T>& to,
                               const ScanArgs<T>& args, int b, int t0, int c0, int lane) {
    if (Whole(args, t0, c0)) {
      ForEach(lane, [&](int i, int t, int column) {
        Store(start + static_cast<int64_t>(to.row) * (i * kRowsAtOnce),
              Load<kVec>(tile + t * kRow + column));
      });
      return;
    }
#pragma unroll 1
    for (int i = lane; i < kSteps * kColumns; i += 32) {
      const int column = i % kColumns, t = i / kColumns;
      if (t0 + t >= args.time || c0 + column >= args.channels) continue;
      to.At(b, t0 + t)[c0 + column] = tile[t * kRow + column];
    }
  }
};

// B and C of a chunk as floats, zeros where there is no such token or state.
template <typename S>
struct BcTile {
  // b once more, as the second operand of InputProducts: per half of 16 states [token % 2][state %
  // 8][token / 2]. The padding parts the banks.
  static constexpr int kOdd = 80, kHalf = 2 * kOdd;
  alignas(16) float b[kSteps][S::kStates], c[kSteps][S::kStates];
  alignas(16) float b_of_pair[S::kExact ? 1 : S::kGroups * 2][kHalf];

  __device__ void SetOfPair(int token, int state, float value) {
    b_of_pair[state / 8][token % 2 * kOdd + state % 8 * 8 + token / 2] = value;
  }
};

// B and C of a chunk, and where its documents begin: fetched into a helper's registers, then stored.
template <typename S>
struct ChunkInputs {
  using T = typename S::T;
  static constexpr int kVec = kVectorOf<T>, kPacks = 16 / kVec;
  Pack<T, kVec> packs[kPacks];  // kPlain: of token lane / 2, b or c
  int32_t start;

  // Starts loading the chunk at t0.
  __device__ void Fetch(const ScanArgs<T>& args, int b, int t0, int lane) {
    start = args.doc_start != nullptr && lane < kSteps && t0 + lane < args.time
                ? args.doc_start[static_cast<int64_t>(b) * args.time + t0 + lane]
                : -1;
    if constexpr (S::kPlain) {
      const bool exists = t0 + lane / 2 < args.time;
      const T* from = (lane % 2 == 0 ? args.b : args.c).At(b, exists ? t0 + lane / 2 : 0);
      if (args.aligned_bc) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          packs[i] = exists ? Load<kVec>(from + i * kVec) : Pack<T, kVec>{};
        }
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) packs[i / kVec].v[i % kVec] = exists ? from[i] : T{};
      }
    }
  }
  // Bit t of `cuts`: token t0 + t begins a document.
  __device__ void Put(BcTile<S>& tile, uint32_t* cuts, const ScanArgs<T>& args, int b, int t0,
                      int lane) const {
    const unsigned mask = __ballot_sync(
        ~0u, args.doc_start != nullptr && lane < kSteps && t0 + lane < args.time &&
                 start == args.first_position + t0 + lane);
    if (lane == 0) *cuts = mask;
    if constexpr (S::kPlain) {
      const int t = lane / 2;
      float* to = lane % 2 == 0 ? tile.b[t] : tile.c[t];
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const auto at = [&](int k) { return ToFloat(packs[(i + k) / kVec].v[(i + k) % kVec]); };
        *reinterpret_cast<float4*>(to + i) = {at(0), at(1), at(2), at(3)};
      }
      if (!S::kExact && lane % 2 == 0) {
#pragma unroll
        for (int n = 0; n < 16; ++n) tile.SetOfPair(t, n, ToFloat(packs[n / kVec].v[n % kVec]));
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < kSteps * S::kStates; i += 32) {
        const int n = i % S::kStates, t = i / S::kStates;
        const bool exists = t0 + t < args.time && n < args.states;
        const float value = exists ? ToFloat(args.b.At(b, t0 + t)[n]) : 0.0f;
        tile.b[t][n] = value;
        tile.c[t][n] = exists ? ToFloat(args.c.At(b, t0 + t)[n]) : 0.0f;
        if (!S::kExact) tile.SetOfPair(t, n, value);
      }
    }
  }
};

// dt * x of a warp's channels and 16 tokens. bf16: as the first operand of InputProducts, with the
// zeros of which half of it consists, in two parts that together keep 21 bits: [channel][token % 2
// and part][token / 2][token % 2]. f32: [channel][token].
struct ChannelInputs {
  static constexpr int kChannel = 68;  // the padding parts the banks
  alignas(16) float dtx[kWarpChannels * kChannel];

  __device__ void Clear(int lane) {
    for (int i = lane; i < kWarpChannels * kChannel; i += 32) dtx[i] = 0.0f;
  }
  // Of this lane's tokens.
  template <bool kExact>
  __device__ void Set(const float (&value)[4], int g, int s) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      float* to = dtx + g * kChannel;
      if constexpr (kExact) {
        to[TokenOf(v, s)] = value[v];
      } else {
        const float high = __uint_as_float(__float_as_uint(value[v]) & 0xffffe000u);
        to += v % 2 * 17 + v / 2 * 8 + 2 * s;
        to[0] = high, to[32] = value[v] - high;
      }
    }
  }
};

// B_t * dt_t * x_t for 8 tokens, by m16n8k4: the rows of the first operand are the channels at even,
// then at odd tokens; the contraction runs over {even, odd} and the parts of dt * x.
struct InputProducts {
  Pack<float, 4> inputs[2], b[2];

  template <typename S>
  __device__ InputProducts(const ChannelInputs& from, const BcTile<S>& tile, int group, int half,
                           int g, int s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      inputs[i] = Load<4>(from.dtx + g * ChannelInputs::kChannel + s * 16 + 8 * half + 4 * i);
      b[i] = Load<4>(tile.b_of_pair[2 * group + i] + s % 2 * BcTile<S>::kOdd + g * 8 + 4 * half);
    }
  }
  // Of the tokens 2 * pair and 2 * pair + 1 of the 8.
  __device__ void Pair(int pair, float (&of_even)[4], float (&of_odd)[4]) const {
    const float* a = inputs[pair / 2].v + pair % 2 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
          "{%7,%7,%7,%7};"
          : "=f"(of_even[2 * i]), "=f"(of_even[2 * i + 1]), "=f"(of_odd[2 * i]),
            "=f"(of_odd[2 * i + 1])
          : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])),
            "r"(__float_as_uint(b[i].v[pair])), "f"(0.0f));
    }
  }
};

// Initialises the stages' barriers; all threads call.
template <typename S, typename Stage, int kStages>
__device__ void InitBarriers(Stage (&stages)[kStages]) {
  if (threadIdx.x == 0) {
    for (Stage& stage : stages) stage.full.Init(33 * S::kHelpers), stage.done.Init(S::kWarps);
  }
  __syncthreads();
}

// In place of dt in the decay exp(dt * A): makes it zero, which cuts the state here and its
// gradient on the way back.
inline constexpr float kCut = 3e38f;
// Sets dt of this lane's tokens of a chunk of `steps` tokens, where it is not what softplus gave:
// a zero, beyond the last token, leaves the state as it is.
__device__ inline void AdjustDecay(float* dts, int s, int steps, uint32_t cuts) {
#pragma unroll 1
  for (int v = 0; v < 4; ++v) {
    const int t = TokenOf(v, s);
    if (t >= steps) dts[t] = 0.0f;
    if (cuts >> t & 1) dts[t] = kCut;
  }
}

// A * log2(e) of a lane's states; zero where there is no state, so that it stays what it was, zero.
__device__ inline float DecayRate(const float* a_log, bool exists, int64_t index) {
  if (!exists) return 0.0f;
  return fminf(-expf(a_log[index]) * kLog2E, -1e-30f);  // kCut must still cut
}

// The lane's four elements of a state [.., I, N], from its first on; `count`: states from the lane's
// first on that exist (kPlain: 16 or none). Null counts as zeros.
template <bool kPlain>
__device__ inline void LoadState(float (&h)[4], const float* from, int count) {
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    h[j] = h[j + 1] = 0.0f;
    const int n = 4 * j;
    if (from == nullptr || n >= count) continue;
    if (kPlain) {
      const float2 two = *reinterpret_cast<const float2*>(from + n);
      h[j] = two.x, h[j + 1] = two.y;
    } else {
      h[j] = from[n];
      if (n + 1 < count) h[j + 1] = from[n + 1];
    }
  }
}
template <bool kPlain>
__device__ inline void StoreState(float* to, int count, const float (&h)[4]) {
  if (to == nullptr) return;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const int n = 4 * j;
    if (n >= count) continue;
    if (kPlain) {
      *reinterpret_cast<float2*>(to + n) = {h[j], h[j + 1]};
    } else {
      to[n] = h[j];
      if (n + 1 < count) to[n + 1] = h[j + 1];
    }
  }
}
// Null stays null.
template <typename T>
__device__ inline T* Offset(T* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}

__device__ inline float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2^x, x <= 0. Exact: the polynomial of the CPU's vector_math.h, whose relative error of 1 - 2^x
// is that of float arithmetic for x near 0.
template <bool kExact>
__device__ inline float Decay(float x) {
  if constexpr (!kExact) return FastExp2(x);
  constexpr float magic = 0x1.8p23f;
  const float shifted = x + magic;
  const float f = x - (shifted - magic);
  float q = 1.559491939e-4f;
  q = fmaf(q, f, 1.340673538e-3f);
  q = fmaf(q, f, 9.617691860e-3f);
  q = fmaf(q, f, 5.550310388e-2f);
  q = fmaf(q, f, 2.402265221e-1f);
  q = fmaf(q, f, 6.931472421e-1f);
  const float power =
      __uint_as_float(__float_as_uint(fmaf(q, f, 1.0f)) + (__float_as_uint(shifted) << 23));
  return x < -64.0f ? 0.0f : power;
}

struct SoftplusAndSlope {
  float value, slope;
};
template <bool kExact>
__device__ inline SoftplusAndSlope Softplus(float x) {
  if constexpr (kExact) {
    const float e = expf(-fabsf(x));
    return {fmaxf(x, 0.0f) + log1pf(e), (x >= 0.0f ? 1.0f : e) / (1.0f + e)};
  } else {
    const float e = FastExp2(-fabsf(x) * kLog2E);
    // log(1 + e) = e q(e) on [0, 1]; minimax, relative error 8e-6.
    float q = -2.38691047e-2f;
    q = fmaf(q, e, 1.01222165e-1f);
    q = fmaf(q, e, -2.10048586e-1f);
    q = fmaf(q, e, 3.25206637e-1f);
    q = fmaf(q, e, -4.99361366e-1f);
    q = fmaf(q, e, 9.99991596e-1f);
    const float value = fmaf(q, e, fmaxf(x, 0.0f));
    return {value, 1.0f - FastExp2(value * -kLog2E)};
  }
}
template <bool kExact>
__device__ inline float Sigmoid(float x) {
  if constexpr (kExact) return 1.0f / (1.0f + expf(-x));
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(0.5f * x));
  return fmaf(0.5f, tanh, 0.5f);
}

// d += a b, m16n8k8, inputs cut to TF32.
__device__ inline void MmaTf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                               float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// For 16 states per channel: the sums over states of `even` and `odd`, two tokens' values, times
// the weights of 8 tokens, of which lane group g holds token g's. The lane s that is the number of
// the pair finds the two sums in d[0] and d[3]: the rows of the product are the channels at the
// even token, then at the odd one, its columns the tokens of the weights.
__device__ inline void SumOverStates(float (&d)[4], const float (&even)[4], const float (&odd)[4],
                                     float4 weights) {
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = 0.0f;
  MmaTf32(d, even[0], odd[0], even[1], odd[1], weights.x, weights.y);
  MmaTf32(d, even[2], odd[2], even[3], odd[3], weights.z, weights.w);
}

// The sum over the four lanes of a channel, in each of them.
__device__ inline float QuadSum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_CUH_
