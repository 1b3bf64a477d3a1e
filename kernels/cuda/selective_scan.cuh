// What the forward and the backward of the selective scan share: how a warp lies over channels and
// states, tiles of 16 tokens in shared memory, and the functions of one element.
//
// A warp owns 8 channels of one sequence and walks through time; lane = 4 * g + s owns channel g
// and states 4s .. 4s+3 (of each group of 16 states). A chunk is 16 tokens. What belongs to a token
// and channel but to no state (softplus, gates, ...) is computed once, by the lane s that has
// tokens 2s, 2s+1, 8+2s, 9+2s of channel g: where the matrix instruction leaves its sums.
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
inline constexpr int kPitch = 24;

// The token of lane s's value v, 0 to 3.
__device__ inline int TokenOf(int v, int s) { return v / 2 * 8 + 2 * s + v % 2; }

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
  // Whether use number `use` has ended: the answer takes long, but can be asked for ahead.
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

// B and C of a chunk, and where its documents begin: fetched into a helper's registers, then
// stored, B and C as floats [2][16][kStates], zeros where there is no such token or state.
template <typename S>
struct ChunkInputs {
  using T = typename S::T;
  static constexpr int kFloats = 2 * kSteps * S::kStates;
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
  __device__ void Put(float* bc, uint32_t* cuts, const ScanArgs<T>& args, int b, int t0,
                      int lane) const {
    const unsigned mask =
        __ballot_sync(~0u, args.doc_start != nullptr && lane < kSteps && t0 + lane < args.time &&
                               start == args.first_position + t0 + lane);
    if (lane == 0) *cuts = mask;
    if constexpr (S::kPlain) {
      float* to = bc + lane % 2 * (kSteps * S::kStates) + lane / 2 * S::kStates;
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const auto at = [&](int k) { return ToFloat(packs[(i + k) / kVec].v[(i + k) % kVec]); };
        *reinterpret_cast<float4*>(to + i) = {at(0), at(1), at(2), at(3)};
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < kFloats; i += 32) {
        const int n = i % S::kStates, t = i / S::kStates % kSteps;
        const bool exists = t0 + t < args.time && n < args.states;
        bc[i] = exists ? ToFloat((i < kFloats / 2 ? args.b : args.c).At(b, t0 + t)[n]) : 0.0f;
      }
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

// Four floats of a state [.., I, N], of which those below `count` exist (kPlain: all or none).
// Null counts as zeros.
template <bool kPlain>
__device__ inline float4 LoadState(const float* from, int count) {
  float4 state = {0.0f, 0.0f, 0.0f, 0.0f};
  if (from == nullptr || count <= 0) return state;
  if constexpr (kPlain) {
    state = *reinterpret_cast<const float4*>(from);
  } else {
    state.x = from[0];
    if (count > 1) state.y = from[1];
    if (count > 2) state.z = from[2];
    if (count > 3) state.w = from[3];
  }
  return state;
}
template <bool kPlain>
__device__ inline void StoreState(float* to, int count, const float (&h)[4]) {
  if (to == nullptr || count <= 0) return;
  if constexpr (kPlain) {
    *reinterpret_cast<float4*>(to) = {h[0], h[1], h[2], h[3]};
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) to[j] = h[j];
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
