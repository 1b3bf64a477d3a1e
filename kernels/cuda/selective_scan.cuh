// What the forward and the backward of the selective scan share: how a warp lies over channels and
// states, and how tiles of 16 tokens get into shared memory and out of it.
//
// A warp owns 8 channels of one sequence and walks through time; lane = 4 * g + s owns channel g
// and four states of each group of 16 (StateOf). A chunk is 16 tokens. What belongs to a token
// and channel but to no state (softplus, gates, ...) is computed once, by the lane s that has
// tokens 2s, 2s+1, 8+2s, 9+2s of channel g: where the matrix instruction leaves its sums.
#ifndef KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_CUH_
#define KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_CUH_

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/selective_scan.h"
#include "kernels/cuda/selective_scan_math.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {

inline constexpr int kSteps = static_cast<int>(kScanSteps);
inline constexpr int kWarpChannels = 8;
// Floats of a channel's 16 steps in a warp's scratch; the padding spreads channels over the banks.
inline constexpr int kPitch = 24;

// The token of lane s's value v, 0 to 3.
__device__ inline int TokenOf(int v, int s) { return v / 2 * 8 + 2 * s + v % 2; }
// The state, of a group of 16, that is lane s's j-th, 0 to 3: in bf16 where ldmatrix leaves B and
// C.
template <bool kExact>
__device__ inline int StateOf(int j, int s) {
  return kExact ? 4 * s + j : j / 2 * 8 + 2 * s + j % 2;
}

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

// Keeps the compiler from computing a loop's invariant again in every turn.
__device__ inline void Keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ inline void Keep(int& value) { asm volatile("" : "+r"(value)); }

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A barrier in shared memory. Thread 0 initialises it, and all synchronise before its first use.
// One lane arrives for its warp after a __syncwarp(), which orders what the others did before it,
// and fetches arrive by themselves. compute-sanitizer's racecheck (13.0) does not see that order:
// it reports pairs of an access by a helper and one by a computing warp, and no other pairs.
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

// B and C of a chunk in shared memory: zeros where there is no such token or state. kCFloats: also
// C as floats, each lane's states together (StateOf).
template <typename S, bool kCFloats>
struct ChunkInputs {
  using T = typename S::T;
  static constexpr int kVec = kVectorOf<T>;
  static constexpr int kRow = S::kStates + kVec;  // the padding parts eight rows' banks
  alignas(16) T b[kSteps][kRow];
  alignas(16) T c[kSteps][kRow];
  alignas(16) float c_floats[kCFloats ? kSteps : 1][S::kStates];
  // Bit t: token t begins a document; kBroken: the chunk has fewer than 16 tokens.
  uint32_t cuts;
  static constexpr uint32_t kBroken = 1u << 31;
};

// What one helper does about B, C and documents. What it has to look at itself, it fetches kAhead
// chunks before it does, so as never to wait for memory.
template <typename S, bool kCFloats>
struct InputFetcher {
  using T = typename S::T;
  using Inputs = ChunkInputs<S, kCFloats>;
  static constexpr int kAhead = 4, kSlots = 2 * kAhead;
  static constexpr int kVec = Inputs::kVec, kPerRow = S::kStates / kVec;
  alignas(16) T c[kCFloats ? kSlots : 1][kSteps][S::kStates];
  int32_t doc_start[kSlots][kSteps];

  static __device__ bool Whole(const ScanArgs<T>& args) { return S::kPlain && args.aligned_bc; }
  template <int kFrom, int kTo, typename Move>
  static __device__ void ForRows(int lane, const Move& move) {
#pragma unroll
    for (int i = kFrom * kSteps * kPerRow + lane; i < kTo * kSteps * kPerRow; i += 32) {
      move(i < kSteps * kPerRow, i / kPerRow % kSteps, i % kPerRow * kVec);
    }
  }
  static __device__ void FetchRow(T* to, const TokenRows<const T>& from, const ScanArgs<T>& args,
                                  int sequence, int t, int column) {
    auto* pack = reinterpret_cast<Pack<T, kVec>*>(to + column);
    if (t < args.time) {
      FetchAsync(pack, from.At(sequence, t) + column);
    } else {
      *pack = {};
    }
  }
  // Starts fetching what will be looked at of a chunk; of none, where its number is negative.
  __device__ void FetchAhead(const ScanArgs<T>& args, int sequence, int chunk, int lane) {
    const int t0 = chunk * kSteps;
    if (chunk >= 0 && t0 < args.time) {
      if (args.doc_start != nullptr && lane < kSteps && t0 + lane < args.time) {
        FetchAsync(reinterpret_cast<Pack<int32_t, 1>*>(&doc_start[chunk % kSlots][lane]),
                   args.doc_start + static_cast<int64_t>(sequence) * args.time + t0 + lane);
      }
      if (kCFloats && Whole(args)) {
        ForRows<0, 1>(lane, [&](bool, int t, int column) {
          FetchRow(c[chunk % kSlots][t], args.c, args, sequence, t0 + t, column);
        });
      }
    }
    __pipeline_commit();
  }
  // Fills `inputs` of a chunk, some of it by fetches; before it, FetchAhead() of the chunks up to
  // kAhead further on.
  __device__ void Fetch(Inputs* inputs, const ScanArgs<T>& args, int sequence, int chunk,
                        int lane) {
    const int t0 = chunk * kSteps;
    __pipeline_wait_prior(kAhead);
    __syncwarp();
    const uint32_t cuts = __ballot_sync(
        ~0u, args.doc_start != nullptr && lane < kSteps && t0 + lane < args.time &&
                 doc_start[chunk % kSlots][lane % kSteps] == args.first_position + t0 + lane);
    if (lane == 0) inputs->cuts = cuts | (t0 + kSteps > args.time ? Inputs::kBroken : 0);
    if (Whole(args)) {
      ForRows<0, 2>(lane, [&](bool of_b, int t, int column) {
        FetchRow((of_b ? inputs->b : inputs->c)[t], of_b ? args.b : args.c, args, sequence, t0 + t,
                 column);
      });
      if constexpr (kCFloats) {
        static_assert(sizeof(T) == 2);
        const int t = lane / 2, half = lane % 2;
        const auto wide = Widen(Load<8>(c[chunk % kSlots][t] + 8 * half));
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          *reinterpret_cast<float2*>(inputs->c_floats[t] + 4 * s + 2 * half) = {wide.v[2 * s],
                                                                                wide.v[2 * s + 1]};
        }
      }
      return;
    }
#pragma unroll 8
    for (int i = lane; i < 2 * kSteps * S::kStates; i += 32) {
      const int n = i % S::kStates, t = i / S::kStates % kSteps;
      const bool exists = t0 + t < args.time && n < args.states;
      const bool of_b = i < kSteps * S::kStates;
      const T value = exists ? (of_b ? args.b : args.c).At(sequence, t0 + t)[n] : T{};
      (of_b ? inputs->b : inputs->c)[t][n] = value;
      if (kCFloats && !of_b) {
        const int slot = n % 8 / 2 * 4 + n / 8 % 2 * 2 + n % 2;
        inputs->c_floats[t][n / 16 * 16 + slot] = ToFloat(value);
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
// Changes dt of this lane's tokens of a chunk of `steps` tokens, where it is not what softplus
// gave: a zero, beyond the last token, leaves the state as it is. Sets their dt to zero in `dt`
// too.
__device__ inline void AdjustDecay(float (&dt)[4], float* dts, int s, int steps, uint32_t cuts) {
  asm volatile("");  // no selects in place of the branch that leads here
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const int t = TokenOf(v, s);
    if (t >= steps) dt[v] = dts[t] = 0.0f;
    if (cuts >> t & 1) dts[t] = kCut;
  }
}

// A * log2(e) of a lane's states; zero where there is no state, so that it stays what it was, zero.
__device__ inline float DecayRate(const float* a_log, bool exists, int64_t index) {
  if (!exists) return 0.0f;
  return fminf(-expf(a_log[index]) * kLog2E, -1e-30f);  // kCut must still cut
}

// A lane's four floats of a group of 16 of a state [.., I, N], of which the first `count` states
// exist (kPlain: all or none). Null counts as zeros.
template <bool kPlain, bool kExact>
__device__ inline void LoadState(float (&h)[4], const float* from, int count, int s) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int n = StateOf<kExact>(j, s);
    h[j] = from != nullptr && (kPlain ? count > 0 : n < count) ? from[n] : 0.0f;
  }
}
template <bool kPlain, bool kExact>
__device__ inline void StoreState(float* to, int count, int s, const float (&h)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int n = StateOf<kExact>(j, s);
    if (to != nullptr && (kPlain ? count > 0 : n < count)) to[n] = h[j];
  }
}
// The same of the states that the forward keeps: in order of states, but in order of lanes where
// there are 16, so that a lane's lie together.
template <bool kExact>
__device__ inline void LoadKept(float (&h)[4], const float* from, int count, int s) {
  if (count != 16) return LoadState<false, kExact>(h, from, count, s);
  const float4 all = *reinterpret_cast<const float4*>(from + 4 * s);
  h[0] = all.x, h[1] = all.y, h[2] = all.z, h[3] = all.w;
}
template <bool kExact>
__device__ inline void StoreKept(float* to, int count, int s, const float (&h)[4]) {
  if (count != 16) return StoreState<false, kExact>(to, count, s, h);
  *reinterpret_cast<float4*>(to + 4 * s) = {h[0], h[1], h[2], h[3]};
}
// Null stays null.
template <typename T>
__device__ inline T* Offset(T* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_CUH_
