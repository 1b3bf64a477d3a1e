// Attention by cuDNN, through the headers of cudnn-frontend.
//
// A graph is built for each shape and kept with its plan: the first takes about a second (libraries
// are loaded), each further one 40 to 70 ms. The heuristic's first answer is taken, so that the
// same shape and version of cuDNN give the same bits.
#include <cudnn.h>
#include <cudnn_frontend.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/check.h"

namespace krait::cuda {
namespace {

namespace fe = cudnn_frontend;
using Attributes = std::shared_ptr<fe::graph::Tensor_attributes>;
using Pointers = std::unordered_map<int64_t, void*>;

void CheckCudnn(cudnnStatus_t status, const char* what, const char* file, int line) {
  if (status == CUDNN_STATUS_SUCCESS) [[likely]] {
    return;
  }
  Fatal(ExitCode::kInternal, file, line, std::string(what) + ": " + cudnnGetErrorString(status));
}
#define KRAIT_CUDNN_CHECK(call) CheckCudnn((call), #call, __FILE__, __LINE__)

// The tensors of a graph.
enum Operand : int64_t { kQ = 1, kK, kV, kY, kLse, kDy, kDq, kDk, kDv, kMask };
constexpr int kOperands = 10;

// All that a plan depends on.
struct Key {
  int64_t sequences, time, heads, kv_heads, head_dim;
  int64_t lse_stride;                                          // of sequences
  std::array<std::array<int64_t, 3>, kOperands> strides = {};  // of sequences, tokens, heads
  bool documents, backward, deterministic;
  auto operator<=>(const Key&) const = default;
};

// One call: a graph and its plan.
class Plan {
 public:
  Plan(cudnnHandle_t library, const Key& key) {
    graph_.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const Attributes q = Input(key, kQ, key.heads), k = Input(key, kK, key.kv_heads),
                     v = Input(key, kV, key.kv_heads);
    Attributes mask;
    if (key.documents) {
      const int64_t stride = CudnnMaskStride(key.time);
      mask = graph_.tensor(fe::graph::Tensor_attributes()
                               .set_uid(kMask)
                               .set_dim({key.sequences, 1, key.time, key.time})
                               .set_stride({key.time * stride, key.time * stride, stride, 1}));
    }
    const float scale = 1 / std::sqrt(static_cast<float>(key.head_dim));
    if (!key.backward) {
      auto attributes = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true);
      Causal(&attributes, scale, mask);
      const auto [y, lse] = graph_.sdpa(q, k, v, attributes);
      Output(key, kY, key.heads, y);
      lse->set_output(true).set_uid(kLse).set_data_type(fe::DataType_t::FLOAT);
      lse->set_dim(LseDims(key)).set_stride(LseStrides(key));
    } else {
      const Attributes y = Input(key, kY, key.heads), dy = Input(key, kDy, key.heads);
      const Attributes lse = graph_.tensor(fe::graph::Tensor_attributes()
                                               .set_uid(kLse)
                                               .set_data_type(fe::DataType_t::FLOAT)
                                               .set_dim(LseDims(key))
                                               .set_stride(LseStrides(key)));
      auto attributes = fe::graph::SDPA_backward_attributes()
                            .set_name("attention_backward")
                            .set_deterministic_algorithm(key.deterministic);
      Causal(&attributes, scale, mask);
      const auto [dq, dk, dv] = graph_.sdpa_backward(q, k, v, y, dy, lse, attributes);
      Output(key, kDq, key.heads, dq);
      Output(key, kDk, key.kv_heads, dk);
      Output(key, kDv, key.kv_heads, dv);
    }
    possible_ = graph_.validate().is_good() && graph_.build_operation_graph(library).is_good() &&
                graph_.create_execution_plans({fe::HeurMode_t::A}).is_good() &&
                graph_.check_support().is_good() && graph_.build_plans().is_good() &&
                graph_.get_workspace_size(workspace_).is_good();
  }

  bool possible() const { return possible_; }
  int64_t workspace() const { return workspace_; }  // bytes
  void Run(cudnnHandle_t library, Pointers pointers, void* workspace) {
    fe::error_t error = graph_.execute(library, pointers, workspace);
    if (error.is_bad()) KRAIT_FATAL("cuDNN attention: " + error.get_message());
  }

 private:
  static std::vector<int64_t> Strides(const Key& key, Operand operand) {
    const auto& [sequence, token, head] = key.strides[static_cast<size_t>(operand) - 1];
    return {sequence, head, token, 1};
  }
  static std::vector<int64_t> LseDims(const Key& key) {
    return {key.sequences, key.heads, key.time, 1};
  }
  static std::vector<int64_t> LseStrides(const Key& key) {
    return {key.lse_stride, key.time, 1, 1};
  }
  Attributes Input(const Key& key, Operand operand, int64_t heads) {
    return graph_.tensor(fe::graph::Tensor_attributes()
                             .set_uid(operand)
                             .set_dim({key.sequences, heads, key.time, key.head_dim})
                             .set_stride(Strides(key, operand)));
  }
  static void Output(const Key& key, Operand operand, int64_t heads, const Attributes& tensor) {
    tensor->set_output(true)
        .set_uid(operand)
        .set_dim({key.sequences, heads, key.time, key.head_dim})
        .set_stride(Strides(key, operand));
  }
  template <typename T>
  static void Causal(T* attributes, float scale, const Attributes& mask) {
    attributes->set_attn_scale(scale)
        .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
    if (mask) attributes->set_bias(mask);
  }

  fe::graph::Graph graph_;
  bool possible_ = false;
  int64_t workspace_ = 0;
};

// One device's handle and the plans seen on it. Used from one thread at a time, as all ops are.
class Library {
 public:
  Library() { KRAIT_CUDNN_CHECK(cudnnCreate(&handle_)); }
  ~Library() {
    plans_.clear();
    cudnnDestroy(handle_);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  static Library& OfCurrentDevice() {
    static std::map<int, Library> libraries;
    int device = 0;
    KRAIT_CUDA_CHECK(cudaGetDevice(&device));
    return libraries[device];
  }
  cudnnHandle_t OnStream(void* stream) {
    KRAIT_CUDNN_CHECK(cudnnSetStream(handle_, static_cast<cudaStream_t>(stream)));
    return handle_;
  }
  Plan& PlanOf(const Key& key) { return plans_.try_emplace(key, handle_, key).first->second; }

 private:
  cudnnHandle_t handle_ = nullptr;
  std::map<Key, Plan> plans_;
};

struct Bound {
  Operand operand;
  Tensor tensor;
};

// All calls of one attention; the first two of `operands` are q and k.
bool Run(std::initializer_list<Bound> operands, Tensor lse, const Documents& documents,
         const CudnnCalls& calls, const AttentionScratch& scratch, bool backward,
         const Context& ctx) {
  const Tensor q = operands.begin()[0].tensor, k = operands.begin()[1].tensor;
  const int64_t batch = q.dim(0), time = q.dim(1), kv_heads = k.dim(2);
  const int64_t group = q.dim(2) / kv_heads;
  for (const auto& [operand, tensor] : operands) {
    if (reinterpret_cast<uintptr_t>(tensor.raw()) % 16 != 0) return false;
  }
  const auto key_of = [&](int64_t sequences, int64_t g) {
    Key key{.sequences = sequences,
            .time = time,
            .heads = g * group,
            .kv_heads = g,
            .head_dim = q.dim(3),
            .lse_stride = g * group * time,
            .documents = documents.doc_start.defined(),
            .backward = backward,
            .deterministic = backward && ctx.deterministic};
    for (const auto& [operand, t] : operands) {
      key.strides[static_cast<size_t>(operand) - 1] = {t.stride(0), t.stride(1), t.stride(2)};
    }
    return key;
  };
  Library& library = Library::OfCurrentDevice();
  const cudnnHandle_t handle = library.OnStream(ctx.stream);
  const auto fits = [&](int64_t sequences, int64_t g) {
    Plan& plan = library.PlanOf(key_of(sequences, g));
    return plan.possible() && plan.workspace() <= scratch.workspace.bytes();
  };
  // Smaller calls where this version of cuDNN wants a larger workspace than is planned for.
  int64_t sequences = calls.sequences, g = calls.kv_heads;
  while (!fits(sequences, g) || (batch % sequences != 0 && !fits(batch % sequences, g)) ||
         (kv_heads % g != 0 && !fits(sequences, kv_heads % g))) {
    if (!library.PlanOf(key_of(sequences, g)).possible()) return false;
    if (sequences > 1) {
      sequences = (sequences + 1) / 2;
    } else if (g > 1) {
      g = (g + 1) / 2;
    } else {
      return false;
    }
  }
  for (int64_t b = 0; b < batch; b += sequences) {
    const int64_t count = std::min(sequences, batch - b);
    if (documents.doc_start.defined()) {
      DocumentMask(scratch.mask.Slice(0, 0, count), documents, b, ctx);
    }
    for (int64_t head = 0; head < kv_heads; head += g) {
      const int64_t heads = std::min(g, kv_heads - head);
      Pointers pointers = {{kMask, scratch.mask.raw()}};
      for (const auto& [operand, t] : operands) {
        const bool of_keys = operand == kK || operand == kV || operand == kDk || operand == kDv;
        pointers[operand] =
            t.Slice(0, b, count)
                .Slice(2, of_keys ? head : head * group, of_keys ? heads : heads * group)
                .raw();
      }
      pointers[kLse] = lse.device_data<float>() + (b * kv_heads + head) * group * time;
      library.PlanOf(key_of(count, heads)).Run(handle, pointers, scratch.workspace.raw());
    }
  }
  return true;
}

}  // namespace

bool CudnnAttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                           const Documents& documents, const CudnnCalls& calls,
                           const AttentionScratch& scratch, const Context& ctx) {
  return Run({{kQ, q}, {kK, k}, {kV, v}, {kY, y}}, lse, documents, calls, scratch,
             /*backward=*/false, ctx);
}

bool CudnnAttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse,
                            Tensor q, Tensor k, Tensor v, const Documents& documents,
                            const CudnnCalls& calls, const AttentionScratch& scratch,
                            const Context& ctx) {
  return Run({{kQ, q}, {kK, k}, {kV, v}, {kY, y}, {kDy, dy}, {kDq, dq}, {kDk, dk}, {kDv, dv}}, lse,
             documents, calls, scratch, /*backward=*/true, ctx);
}

}  // namespace krait::cuda
