// Dense matrix products by cuBLASLt.
//
// It is column-major: a row-major c = op(a) op(b) is c^T = op(b)^T op(a)^T of the same memory, so
// the operands change places and no transposition is added.
//
// Which algorithm: of the heuristic's first eight answers the first one of a two-CTA cluster with a
// tile of kTiles and a whole sum over k, else the first answer. The heuristic likes larger tiles,
// which finish a tile's stores before the next one's products begin; over the step's shapes
// (K 128 to 28672, forward, backward and fp32 weight gradients, hot H200, cuBLASLt 13.1) its first
// answers lose 6.3 % against the best of eight, 23 % in the LM head's weight gradient; this rule
// 0.9 %. A choice by stopwatch would not be deterministic.
#include "kernels/cuda/gemm.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "kernels/cuda/check.h"

namespace krait::cuda {
namespace {

void CheckBlas(cublasStatus_t status, const char* what, const char* file, int line) {
  if (status == CUBLAS_STATUS_SUCCESS) [[likely]] {
    return;
  }
  Fatal(ExitCode::kInternal, file, line,
        std::string(what) + ": " + cublasLtGetStatusName(status) + ", " +
            cublasLtGetStatusString(status));
}
#define KRAIT_BLAS_CHECK(call) CheckBlas((call), #call, __FILE__, __LINE__)

constexpr std::array kTiles = {CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_128x128,
                               CUBLASLT_MATMUL_TILE_176x128, CUBLASLT_MATMUL_TILE_168x128};

// All that the choice of an algorithm depends on.
struct Key {
  int64_t m, n, k, a_stride, b_stride, c_stride;
  uint32_t a_alignment, b_alignment, c_alignment;
  bool has_bias, transpose_a, transpose_b, accumulate, f32_inputs, f32_output;
  auto operator<=>(const Key&) const = default;
};

// A product ready to run: descriptions and, unless cuBLASLt refuses it, an algorithm.
class Plan {
 public:
  Plan(cublasLtHandle_t library, const Key& key) {
    KRAIT_BLAS_CHECK(cublasLtMatmulDescCreate(&product_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    Set(CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    Set(CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (key.has_bias) Set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    const cudaDataType in = key.f32_inputs ? CUDA_R_32F : CUDA_R_16BF;
    const cudaDataType out = key.f32_output ? CUDA_R_32F : CUDA_R_16BF;
    Describe(&b_, in, key.transpose_b ? key.n : key.k, key.transpose_b ? key.k : key.n,
             key.b_stride);
    Describe(&a_, in, key.transpose_a ? key.k : key.m, key.transpose_a ? key.m : key.k,
             key.a_stride);
    Describe(&c_, out, key.m, key.n, key.c_stride);
    Choose(library, key);
  }
  ~Plan() {
    cublasLtMatrixLayoutDestroy(a_);
    cublasLtMatrixLayoutDestroy(b_);
    cublasLtMatrixLayoutDestroy(c_);
    cublasLtMatmulDescDestroy(product_);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // False where cuBLASLt has no algorithm for the product, or none that takes these addresses.
  bool Run(cublasLtHandle_t library, Tensor c, Tensor a, Tensor b, Tensor bias, bool accumulate,
           Tensor workspace, const Context& ctx) {
    if (!possible_) return false;
    if (bias.defined()) Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.raw());
    const float alpha = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    const cublasStatus_t status = cublasLtMatmul(
        library, product_, &alpha, b.raw(), b_, a.raw(), a_, &beta, c.raw(), c_, c.raw(), c_,
        &algorithm_, workspace.raw(), static_cast<size_t>(workspace.bytes()),
        static_cast<cudaStream_t>(ctx.stream));
    possible_ = status != CUBLAS_STATUS_NOT_SUPPORTED;
    if (possible_) CheckBlas(status, "cublasLtMatmul", __FILE__, __LINE__);
    return possible_;
  }

 private:
  template <typename T>
  void Set(cublasLtMatmulDescAttributes_t attribute, T value) {
    KRAIT_BLAS_CHECK(cublasLtMatmulDescSetAttribute(product_, attribute, &value, sizeof(value)));
  }
  // A row-major matrix [rows, columns].
  static void Describe(cublasLtMatrixLayout_t* layout, cudaDataType type, int64_t rows,
                       int64_t columns, int64_t stride) {
    KRAIT_BLAS_CHECK(cublasLtMatrixLayoutCreate(layout, type, static_cast<uint64_t>(columns),
                                                static_cast<uint64_t>(rows), stride));
  }

  static int Config(const cublasLtMatmulAlgo_t& algorithm,
                    cublasLtMatmulAlgoConfigAttributes_t attribute, size_t size) {
    int value = 0;
    size_t written = 0;
    KRAIT_BLAS_CHECK(
        cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, size, &written));
    return value;
  }
  static bool Preferred(const cublasLtMatmulAlgo_t& algorithm) {
    const int cluster = Config(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, sizeof(uint16_t));
    const int tile = Config(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, sizeof(uint32_t));
    const int parts = Config(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, sizeof(uint32_t));
    return parts <= 1 && std::find(kTiles.begin(), kTiles.end(), tile) != kTiles.end() &&
           (cluster == CUBLASLT_CLUSTER_SHAPE_2x1x1 || cluster == CUBLASLT_CLUSTER_SHAPE_1x2x1);
  }

  void Choose(cublasLtHandle_t library, const Key& key) {
    cublasLtMatmulPreference_t preference;
    KRAIT_BLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      KRAIT_BLAS_CHECK(
          cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kMatMulWorkspace));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b_alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a_alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c_alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c_alignment);
    // Parts of a sum over k are added in f32 and rounded once.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    std::array<cublasLtMatmulHeuristicResult_t, 8> answers;
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(library, product_, b_, a_, c_, c_, preference,
                                       static_cast<int>(answers.size()), answers.data(), &count);
    KRAIT_BLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    possible_ = status == CUBLAS_STATUS_SUCCESS && count > 0;
    if (!possible_) return;
    algorithm_ = answers[0].algo;
    if (key.f32_inputs) return;
    for (int i = 0; i < count; ++i) {
      if (answers[i].state != CUBLAS_STATUS_SUCCESS || !Preferred(answers[i].algo)) continue;
      algorithm_ = answers[i].algo;
      return;
    }
  }

  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, c_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_ = {};
  bool possible_ = false;
};

// One device's handle and the products seen on it. Used from one thread at a time, as all ops are.
class Library {
 public:
  Library() { KRAIT_BLAS_CHECK(cublasLtCreate(&handle_)); }
  ~Library() {
    plans_.clear();
    cublasLtDestroy(handle_);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  static Library& OfCurrentDevice() {
    static std::map<int, Library> libraries;
    int device = 0;
    KRAIT_CUDA_CHECK(cudaGetDevice(&device));
    return libraries[device];
  }
  cublasLtHandle_t handle() const { return handle_; }
  Plan& PlanOf(const Key& key) { return plans_.try_emplace(key, handle_, key).first->second; }

 private:
  cublasLtHandle_t handle_ = nullptr;
  std::map<Key, Plan> plans_;
};

}  // namespace

void MatMul(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b, Tensor bias,
            bool accumulate, Tensor workspace, const Context& ctx) {
  const int64_t m = c.rows(), n = c.dim(-1), k = transpose_a ? a.rows() : a.dim(-1);
  if (m == 0) return;
  KRAIT_CHECK(a.dtype() == b.dtype() && workspace.bytes() >= kMatMulWorkspace);
  // No preference tells cuBLASLt of a bias's alignment: its kernels may expect 16 bytes.
  if (k > 0 && (!bias.defined() || AlignmentOf(bias.raw()) >= 16)) {
    const Key key = {m,
                     n,
                     k,
                     a.row_stride(),
                     b.row_stride(),
                     c.row_stride(),
                     AlignmentOf(a.raw()),
                     AlignmentOf(b.raw()),
                     AlignmentOf(c.raw()),
                     bias.defined(),
                     transpose_a,
                     transpose_b,
                     accumulate,
                     a.dtype() == DType::kF32,
                     c.dtype() == DType::kF32};
    Library& library = Library::OfCurrentDevice();
    Plan& plan = library.PlanOf(key);
    if (plan.Run(library.handle(), c, a, b, bias, accumulate, workspace, ctx)) return;
  }
  PlainMatMul(c, a, transpose_a, b, transpose_b, bias, accumulate, ctx);
}

}  // namespace krait::cuda
