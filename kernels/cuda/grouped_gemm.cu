// The experts' bf16 products, sizes read on the device.
//
//   forward  y[rows of e, O] = x w[e]^T      backward  dx[rows of e, I] = dy w[e]
//   weight   dw[e] (+)= dy^T x over the rows of e, f32
//
// Two blocks form a cluster: they work on two tiles of 128 rows above each other, share the tile of
// b (each fetches one half for both), and walk over all tiles with the other clusters. In a block
// one thread fetches operands, 64 of k at a time, into a ring of stages with the copy engine, and
// two warpgroups multiply. Together they have a tile of 256 columns, 64 rows each. In turns they
// have tiles of 192 columns: one stores while the other multiplies, which matters to a weight
// gradient of few rows, whose sums are short beside a tile of f32 to write. Adding to dw is a
// reduction of the copy engine.
//
// Segments of rows begin at multiples of 128, so no tile has rows of two experts; an odd number of
// tiles leaves the lower block of the last pair without work. The tensor maps cover the whole
// buffers, so that the host needs no sizes. What lies beyond an operand's columns is read as zero
// and not written.
//
// Rates on an H100 at its power limit (bench_gemm_gpu_bench grouped: uneven routing, pad rows not
// counted; the same call gives 5 % more or less from run to run), TFLOP/s forward / backward /
// weight / weight adding; "each" is a cuBLASLt product for each expert with sizes on the host:
//                                    this kernel                    each
//   8 experts 16384 x 2048 x 11264   636 / 644 / 597 / 524          621 / 579 / 587 / 533
//   8 experts 16384 x 5632 x 2048    615 / 572 / 580 / 547          592 / 571 / 460 / 444
//   16 experts 32768 x 4096 x 14336  664 / 669 / 618 / 458          612 / 597 / 615 / 595
//   8 experts 32768 x 4096 x 28672   667 / 694 / 588 / 606          675 / 648 / 602 / 613
//   4 experts 32768 x 4096 x 28672   674 / 661 / 648 / 649          669 / 667 / 594 / 588
// In another run, all products in turns: forward 0 to 9 % and backward 1 to 10 % less, weights of
// 4096 rows an expert and more 1 to 23 % less, weights of 2048 rows within 5 % either way. At the
// power limit the energy of operands counts: a tile of 256 columns takes 6 % less of shared memory
// and 14 % less of L2 for each product, and 4096 columns are 21.3 tiles of 192. Weights of 2048
// rows gained nothing from two slabs a warpgroup and four stages, nor together from four slabs and
// three stages; adding, they move 8 bytes of dw for 4096 FLOPs: 16 experts of 4096 x 14336 2.5 of
// the 6.4 ms that 600 TFLOP/s leave, at the card's copy rate. What they reach varies with the
// card's state: 490, 584 and 570 adding, 609, 553 and 619 overwriting in turns on H100s.
// Adding gained nothing from dw's tile fetched into L2 during the products (8 experts lost 5 to 10
// %) nor from writing dw as what leaves L2 first; storing from registers without shared memory lost
// 5 to 30 %.
#include <cuda.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kTileM = 128;             // rows of an output tile
constexpr int kStep = 64;               // of k in one stage: 128 bytes, the width of the swizzle
constexpr int kPanel = 64 * kStep * 2;  // bytes of 64 rows or columns of an operand in a stage
constexpr int kSlab = 64 * 128;  // bytes of output that are stored at a time: 64 rows of 128 bytes
constexpr int kThreads = 384;    // two warpgroups that multiply and one that fetches
// Rows of an expert, on average, from which weight gradients are computed together.
constexpr int64_t kRowsTogether = 3072;
// How the two warpgroups share the block's tiles: both work on each, or each takes one in turn.
template <bool kTogether>
struct Tile {
  static constexpr int kN = kTogether ? 256 : 192;   // columns
  static constexpr int kPanels = kTogether ? 1 : 2;  // of 64 rows that a warpgroup has
  static constexpr int kBytesA = kTileM / 64 * kPanel, kBytesB = kN / 64 * kPanel;
  static constexpr int kStage = kBytesA + kBytesB, kStages = kTogether ? 4 : 5;  // of the ring
  static constexpr int kSlabs = kTogether ? 2 : 1;                               // of a warpgroup
  static constexpr int kShared = 1024 + kStages * kStage + 2 * kSlabs * kSlab + kStages * 16;
  static_assert(kShared <= 227 * 1024);
};
// Pairs of tiles, above each other, of a band: the clusters at work cover about a square of the
// output, which keeps their operands in the L2 cache. 4 was within 2 %, 16 lost up to 20 % where K
// is 4096 and more.
constexpr int kBand = 8;

// ---- PTX

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline void BarrierInit(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Waits until the phase of this parity is over.
__device__ inline void BarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ inline void BarrierExpectBytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives at the barrier at the same address in a block of the cluster.
__device__ inline void BarrierArriveAt(uint32_t barrier, int block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
__device__ inline void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// A barrier of `threads` threads beside __syncthreads(): waits, or only arrives.
__device__ inline void NamedSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void NamedArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Fetches the box at (x, y, z) of a map, x its innermost coordinate; the barrier counts its bytes.
__device__ inline void Fetch(uint32_t to, const CUtensorMap* map, int x, int y, int z,
                             uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
// The same into both blocks of the cluster, each with its own barrier.
__device__ inline void FetchForBoth(uint32_t to, const CUtensorMap* map, int x, int y, int z,
                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}
__device__ inline void StoreBox(const CUtensorMap* map, uint32_t from, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%1, {%2, %3, %4}], [%0];" ::"r"(from),
      "l"(map), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void AddBox(const CUtensorMap* map, uint32_t from, int x, int y, int z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group"
      " [%1, {%2, %3, %4}], [%0];" ::"r"(from),
      "l"(map), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// What wgmma is told of an operand in shared memory: 128-byte swizzle, groups of 8 rows of 128
// bytes, and panels of 64 rows or columns one behind the other.
__device__ inline uint64_t Descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(kPanel >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 |
         uint64_t{1} << 62;
}
__device__ inline void MultiplyFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void MultiplyCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void MultiplyWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// c[64,N] = a[64,16] b[16,N] (+ c unless `first`) of a warpgroup, N 192 or 256. An operand is
// "along m" or "along n" when its unit stride is, else it is along k.
#define REGISTERS_96                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
template <bool kAlongM, bool kAlongN>
__device__ inline void Multiply(float (&c)[96], uint64_t a, uint64_t b, bool first) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.eq.b32 add, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 " REGISTERS_96
      "}, %96, %97, add, 1, 1, %99, %100;\n}"
      : C16(0), C16(16), C16(32), C16(48), C16(64), C16(80)
      : "l"(a), "l"(b), "r"(static_cast<int>(first)), "n"(kAlongM), "n"(kAlongN));
}
template <bool kAlongM, bool kAlongN>
__device__ inline void Multiply(float (&c)[128], uint64_t a, uint64_t b, bool first) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.eq.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " REGISTERS_96
      ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "
      "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "
      "%125, %126, %127}, %128, %129, add, 1, 1, %131, %132;\n}"
      : C16(0), C16(16), C16(32), C16(48), C16(64), C16(80), C16(96), C16(112)
      : "l"(a), "l"(b), "r"(static_cast<int>(first)), "n"(kAlongM), "n"(kAlongN));
}
#undef C16
#undef C4
#undef REGISTERS_96

// ---- Tiles

// An expert's output has m rows (kWeight) or as many as the expert, n columns, and sums over k (or
// over the expert's rows).
struct Extents {
  int experts, m, n, k;
};

// The pairs of tiles of one cluster, in order: expert by expert, in bands of kBand pairs of rows,
// down each column of a band. Every warp of the block walks along.
template <Grouped kKind, int kTileN>
struct Walk {
  const int64_t* offsets;
  const Extents& extents;
  int index = static_cast<int>(blockIdx.x / 2);  // of the pair among all
  int first = 0;                                 // index of the expert's first pair
  int expert = 0;
  int begin, rows;  // of the expert
  int m, n;         // the pair: its row of pairs and column of tiles

  __device__ Walk(const int64_t* expert_offsets, const Extents& all)
      : offsets(expert_offsets), extents(all) {
    ReadExpert();
  }
  __device__ void ReadExpert() {
    begin = static_cast<int>(offsets[expert]);
    rows = static_cast<int>(offsets[expert + 1]) - begin;
  }
  // The pair at `index`; false when there is none.
  __device__ bool Find() {
    const int columns = (extents.n + kTileN - 1) / kTileN;
    int pairs;
    for (;;) {
      const int height = kKind == Grouped::kWeight ? extents.m : rows;
      pairs = (height + 2 * kTileM - 1) / (2 * kTileM);
      const int count = pairs * columns;
      if (index < first + count) break;
      first += count;
      if (++expert == extents.experts) return false;
      ReadExpert();
    }
    const int local = index - first, band = local / (kBand * columns);
    const int within = local - band * kBand * columns, height = min(kBand, pairs - band * kBand);
    n = within / height;
    m = band * kBand + within % height;
    return true;
  }
  __device__ void Next() { index += static_cast<int>(gridDim.x / 2); }
  // Whether the tile of a block of the cluster has rows.
  __device__ bool HasRows(int block) const {
    return kKind == Grouped::kWeight || (m * 2 + block) * kTileM < rows;
  }
  __device__ int Steps() const {
    return ((kKind == Grouped::kWeight ? rows : extents.k) + kStep - 1) / kStep;
  }
};

// A place in the ring, and the parity of its round.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Advance(int steps) {
    stage += steps;
    parity ^= stage / kStages & 1;
    stage %= kStages;
  }
};

// ---- The kernel

template <Grouped kKind>
using OutputOf = std::conditional_t<kKind == Grouped::kWeight, float, BF16>;

// One slab of this warpgroup's results into shared memory, in the copy engine's 128-byte swizzle.
// c holds its 64 rows as wgmma leaves them: for each 8 columns two of the row lane / 4, two of the
// row 8 below.
template <typename Out>
__device__ inline void WriteSlab(uint32_t to, const float* c) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<Out, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + half * 8 + lane / 4, column = i * 8 + lane % 4 * 2;
        const uint32_t at = to + row * 128 + ((column / 4) ^ (row % 8)) * 16 + column % 4 * 4;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(c[i * 4 + half * 2]),
                     "f"(c[i * 4 + half * 2 + 1])
                     : "memory");
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(c[i * 8 + j * 2], c[i * 8 + j * 2 + 1]);
        pair[j] = *reinterpret_cast<const uint32_t*>(&two);
      }
      const int row = warp * 16 + lane % 16, chunk = i * 2 + lane / 16;
      const uint32_t at = to + row * 128 + (chunk ^ (row % 8)) * 16;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                   "r"(pair[0]), "r"(pair[1]), "r"(pair[2]), "r"(pair[3])
                   : "memory");
    }
  }
}

template <Grouped kKind, bool kTogether>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    GroupedKernel(const __grid_constant__ CUtensorMap map_a,
                  const __grid_constant__ CUtensorMap map_b,
                  const __grid_constant__ CUtensorMap map_c, const int64_t* offsets,
                  Extents extents, bool accumulate) {
  using T = Tile<kTogether>;
  constexpr bool kAlongM = kKind == Grouped::kWeight, kAlongN = kKind != Grouped::kForward;
  constexpr int kTileN = T::kN, kBytesA = T::kBytesA, kBytesB = T::kBytesB;
  constexpr int kStage = T::kStage, kStages = T::kStages;
  extern __shared__ uint8_t dynamic[];
  const uint32_t ring = (SharedAddress(dynamic) + 1023) & ~1023u;  // the swizzle's period
  const uint32_t slabs = ring + kStages * kStage, barriers = slabs + 2 * T::kSlabs * kSlab;
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  const int block = static_cast<int>(blockIdx.x % 2);  // of the cluster
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(full(i), 1);
      // The warps that multiplied in both blocks.
      BarrierInit(empty(i), kTogether ? 2 * 8 : 2 * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  ClusterSync();

  const int warpgroup = static_cast<int>(threadIdx.x / 128);
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 2 * 128) {
      Place<kStages> place;
      for (Walk<kKind, kTileN> walk(offsets, extents); walk.Find(); walk.Next()) {
        const int row = (walk.m * 2 + block) * kTileM, column = walk.n * kTileN;
        const int steps = walk.Steps();
        const bool has_rows = walk.HasRows(block);
        for (int i = 0; i < steps; ++i, place.Advance(1)) {
          const uint32_t barrier = full(place.stage);
          const uint32_t a = ring + place.stage * kStage, b = a + kBytesA;
          BarrierWait(empty(place.stage), place.parity ^ 1);
          BarrierExpectBytes(barrier, (has_rows ? kBytesA : 0) + kBytesB);
          if constexpr (kAlongM) {
            Fetch(a, &map_a, row, walk.begin + i * kStep, 0, barrier);
            Fetch(a + kPanel, &map_a, row + 64, walk.begin + i * kStep, 0, barrier);
          } else if (has_rows) {
            Fetch(a, &map_a, i * kStep, walk.begin + row, 0, barrier);
          }
          // This block's half of b.
          if constexpr (kKind == Grouped::kForward) {
            FetchForBoth(b + block * (kBytesB / 2), &map_b, i * kStep, column + block * kTileN / 2,
                         walk.expert, barrier);
          } else {
            const int k = i * kStep + block * kStep / 2;
            for (int panel = 0; panel < kTileN / 64; ++panel) {
              FetchForBoth(b + panel * kPanel + block * (kPanel / 2), &map_b, column + panel * 64,
                           kKind == Grouped::kInput ? k : walk.begin + k,
                           kKind == Grouped::kInput ? walk.expert : 0, barrier);
            }
          }
        }
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % 32;
    const bool leader = threadIdx.x % 128 == 0;
    uint32_t my_slab = slabs + warpgroup * (T::kSlabs * kSlab);
    const uint32_t my_slabs = 2 * my_slab + kSlab;  // the sum of the two
    // The warpgroups wait for their turns: it keeps the order of their products, and a warpgroup a
    // round of the ring ahead would take a stage's last phase for the one that it waits for.
    const auto wait_turn = [&] {
      if (!kTogether) NamedSync(3 + warpgroup, 256);
    };
    const auto pass_turn = [&] {
      if (!kTogether) NamedArrive(4 - warpgroup, 256);
    };
    if (warpgroup == 1) pass_turn();
    const auto release = [&](int stage) {
      if (lane < 2) BarrierArriveAt(empty(stage), lane);
    };
    Place<kStages> place;
    bool mine = kTogether || warpgroup == 0;
    const uint32_t my_a = kTogether ? ring + warpgroup * kPanel : ring;
    float c[T::kPanels][kTileN / 2];
    for (Walk<kKind, kTileN> walk(offsets, extents); walk.Find();
         walk.Next(), mine = kTogether || !mine) {
      const int steps = walk.Steps();
      if (!mine) {
        place.Advance(steps);
        continue;
      }
      wait_turn();
      if (!walk.HasRows(block)) {
        for (int i = 0; i < steps; ++i, place.Advance(1)) {
          BarrierWait(full(place.stage), place.parity);
          release(place.stage);
        }
        pass_turn();
        continue;
      }
      int last = -1;  // the stage whose products may still run
      for (int i = 0; i < steps; ++i, place.Advance(1)) {
        BarrierWait(full(place.stage), place.parity);
        const uint32_t a = my_a + place.stage * kStage;
        const uint32_t b = ring + place.stage * kStage + kBytesA;
        MultiplyFence();
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k) {
          const uint32_t at_a = a + k * (kAlongM ? 16 * 128 : 32);
          const uint32_t at_b = b + k * (kAlongN ? 16 * 128 : 32);
          const bool first = i == 0 && k == 0;
#pragma unroll
          for (int panel = 0; panel < T::kPanels; ++panel) {
            Multiply<kAlongM, kAlongN>(c[panel], Descriptor(at_a + panel * kPanel),
                                       Descriptor(at_b), first);
          }
        }
        MultiplyCommit();
        if (last >= 0) {
          MultiplyWait<1>();
          release(last);
        }
        last = place.stage;
      }
      pass_turn();
      MultiplyWait<0>();
      if (last >= 0) release(last);
      if (steps == 0) {  // an expert without rows
        if (accumulate) continue;
#pragma unroll
        for (auto& panel : c) {
#pragma unroll
          for (float& sum : panel) sum = 0.0f;
        }
      }

      using Out = OutputOf<kKind>;
      constexpr int kWidth = 128 / static_cast<int>(sizeof(Out));  // columns of a slab
#pragma unroll
      for (int panel = 0; panel < T::kPanels; ++panel) {
#pragma unroll
        for (int column = 0; column < kTileN; column += kWidth) {
          // The last store from this slab has read it.
          if (leader) {
            asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(T::kSlabs - 1) : "memory");
          }
          NamedSync(1 + warpgroup, 128);
          WriteSlab<Out>(my_slab, &c[panel][column / 2]);
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
          NamedSync(1 + warpgroup, 128);
          const uint32_t slab = my_slab;
          if (T::kSlabs == 2) my_slab = my_slabs - my_slab;
          if (!leader) continue;
          const int x = walk.n * kTileN + column;
          const int y = (walk.m * 2 + block) * kTileM + (kTogether ? warpgroup : panel) * 64;
          if constexpr (kKind != Grouped::kWeight) {
            StoreBox(&map_c, slab, x, walk.begin + y, 0);
          } else if (accumulate) {
            AddBox(&map_c, slab, x, y, walk.expert);
          } else {
            StoreBox(&map_c, slab, x, y, walk.expert);
          }
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
      }
    }
    if (leader) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    __syncwarp();
  }
  // No block ends while the other may still arrive at its barriers.
  ClusterSync();
}

// ---- Host

// A map over [z, rows, columns] of t (rank 3, or 2 with z = 1), in boxes of 128 bytes by
// `box_rows`.
CUtensorMap MapOf(Tensor t, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    KRAIT_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                      cudaEnableDefault, &found));
    KRAIT_CHECK(found == cudaDriverEntryPointSuccess);
    return reinterpret_cast<Encode>(function);
  }();
  const int64_t size = SizeOf(t.dtype()), rows = t.dim(-2), pitch = t.row_stride() * size;
  const int64_t experts = t.rank() == 3 ? t.dim(0) : 1;
  KRAIT_CHECK(rows <= INT32_MAX && t.dim(-1) <= INT32_MAX);  // coordinates are 32-bit
  const cuuint64_t extents[3] = {static_cast<cuuint64_t>(t.dim(-1)), static_cast<cuuint64_t>(rows),
                                 static_cast<cuuint64_t>(experts)};
  const cuuint64_t strides[2] = {
      static_cast<cuuint64_t>(pitch),
      static_cast<cuuint64_t>(t.rank() == 3 ? t.stride(0) * size : rows * pitch)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(128 / size), static_cast<cuuint32_t>(box_rows),
                             1};
  const cuuint32_t step[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, size == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             3, t.raw(), extents, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    KRAIT_FATAL("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

// Whether the copy engine can take the tensor: rows that begin and end at 16 bytes.
bool Mappable(Tensor t) {
  return Vectorizable(t) && t.row_stride() * SizeOf(t.dtype()) % 16 == 0 && t.numel() > 0;
}

int64_t Clusters() {
  static const int64_t clusters = [] {
    int device = 0, multiprocessors = 0;
    KRAIT_CUDA_CHECK(cudaGetDevice(&device));
    KRAIT_CUDA_CHECK(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    return std::max(1, multiprocessors / 2);
  }();
  return clusters;
}

template <Grouped kKind, bool kTogether>
void LaunchGrouped(const char* name, Tensor out, Tensor a, Tensor b, Tensor offsets,
                   bool accumulate, const Context& ctx) {
  using T = Tile<kTogether>;
  constexpr bool kWeight = kKind == Grouped::kWeight;
  // The kernel counts tiles in 32 bits.
  const int64_t height = kWeight ? out.dim(0) * out.dim(1) : out.dim(0) + 256 * offsets.numel();
  KRAIT_CHECK((height / kTileM + 1) * (out.dim(-1) / T::kN + 1) <= INT32_MAX);
  const Extents extents = {static_cast<int>(offsets.numel() - 1),
                           kWeight ? static_cast<int>(out.dim(1)) : 0,
                           static_cast<int>(out.dim(-1)), kWeight ? 0 : static_cast<int>(a.dim(1))};
  Launch(name, GroupedKernel<kKind, kTogether>, 2 * Clusters(), dim3(kThreads), T::kShared, ctx,
         MapOf(a, kWeight ? 64 : kTileM),
         MapOf(b, kKind == Grouped::kForward ? T::kN / 2 : kStep / 2), MapOf(out, 64),
         static_cast<const int64_t*>(offsets.device_data<int64_t>()), extents, accumulate);
}

// out, a, b as in PlainGrouped().
template <Grouped kKind>
void Run(const char* name, Tensor out, Tensor a, Tensor b, Tensor offsets, bool accumulate,
         const Context& ctx) {
  constexpr bool kWeight = kKind == Grouped::kWeight;
  if (a.dtype() != DType::kBF16 || out.dtype() != (kWeight ? DType::kF32 : DType::kBF16) ||
      !Mappable(a) || !Mappable(b) || !Mappable(out)) {
    return PlainGrouped(kKind, out, a, b, offsets, accumulate, ctx);
  }
  if constexpr (kWeight) {
    if (a.dim(0) < kRowsTogether * (offsets.numel() - 1)) {
      return LaunchGrouped<kKind, false>(name, out, a, b, offsets, accumulate, ctx);
    }
  }
  LaunchGrouped<kKind, true>(name, out, a, b, offsets, accumulate, ctx);
}

}  // namespace

void GroupedLinearForward(Tensor y, Tensor x, Tensor w, Tensor offsets, const Context& ctx) {
  Run<Grouped::kForward>("GroupedLinearForward", y, x, w, offsets, false, ctx);
}

void GroupedLinearBackwardInput(Tensor dx, Tensor dy, Tensor w, Tensor offsets,
                                const Context& ctx) {
  Run<Grouped::kInput>("GroupedLinearBackwardInput", dx, dy, w, offsets, false, ctx);
}

void GroupedLinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, Tensor offsets, bool accumulate,
                                 const Context& ctx) {
  Run<Grouped::kWeight>("GroupedLinearBackwardWeight", dw, dy, x, offsets, accumulate, ctx);
}

}  // namespace krait::cuda
