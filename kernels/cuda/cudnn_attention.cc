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

#include "kernels/cuda/activation.h"
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
bool OfKeys(Operand operand) {
  return operand == kK || operand == kV || operand == kDk || operand == kDv;
}

// All that a plan depends on.
struct Key {
  int64_t sequences, queries, keys, heads, kv_heads, head_dim;
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
    const Attributes q = Input(key, kQ), k = Input(key, kK), v = Input(key, kV);
    Attributes mask;
    if (key.documents) {
      const int64_t stride = CudnnMaskStride(key.queries), rows = key.queries * stride;
      mask = graph_.tensor(fe::graph::Tensor_attributes()
                               .set_uid(kMask)
                               .set_dim({key.sequences, 1, key.queries, key.keys})
                               .set_stride({rows, rows, stride, 1}));
    }
    const float scale = 1 / std::sqrt(static_cast<float>(key.head_dim));
    if (!key.backward) {
      auto attributes = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true);
      Causal(key, &attributes, scale, mask);
      const auto [y, lse] = graph_.sdpa(q, k, v, attributes);
      Output(key, kY, y);
      lse->set_output(true).set_uid(kLse).set_data_type(fe::DataType_t::FLOAT);
      lse->set_dim(LseDims(key)).set_stride(LseStrides(key));
    } else {
      const Attributes y = Input(key, kY), dy = Input(key, kDy);
      const Attributes lse = graph_.tensor(fe::graph::Tensor_attributes()
                                               .set_uid(kLse)
                                               .set_data_type(fe::DataType_t::FLOAT)
                                               .set_dim(LseDims(key))
                                               .set_stride(LseStrides(key)));
      auto attributes = fe::graph::SDPA_backward_attributes()
                            .set_name("attention_backward")
                            .set_deterministic_algorithm(key.deterministic);
      Causal(key, &attributes, scale, mask);
      const auto [dq, dk, dv] = graph_.sdpa_backward(q, k, v, y, dy, lse, attributes);
      Output(key, kDq, dq);
      Output(key, kDk, dk);
      Output(key, kDv, dv);
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
  static std::vector<int64_t> Dims(const Key& key, Operand operand) {
    const bool of_keys = OfKeys(operand);
    return {key.sequences, of_keys ? key.kv_heads : key.heads, of_keys ? key.keys : key.queries,
            key.head_dim};
  }
  static std::vector<int64_t> LseDims(const Key& key) {
    return {key.sequences, key.heads, key.queries, 1};
  }
  static std::vector<int64_t> LseStrides(const Key& key) {  // cuDNN takes it packed alone
    return {key.heads * key.queries, key.queries, 1, 1};
  }
  Attributes Input(const Key& key, Operand operand) {
    return graph_.tensor(fe::graph::Tensor_attributes()
                             .set_uid(operand)
                             .set_dim(Dims(key, operand))
                             .set_stride(Strides(key, operand)));
  }
  static void Output(const Key& key, Operand operand, const Attributes& tensor) {
    tensor->set_output(true)
        .set_uid(operand)
        .set_dim(Dims(key, operand))
        .set_stride(Strides(key, operand));
  }
  // The last query sees the last key.
  template <typename T>
  static void Causal(const Key& key, T* attributes, float scale, const Attributes& mask) {
    attributes->set_attn_scale(scale)
        .set_diagonal_alignment(key.queries == key.keys ? fe::DiagonalAlignment_t::TOP_LEFT
                                                        : fe::DiagonalAlignment_t::BOTTOM_RIGHT)
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

// One attention: its calls.
class Attention {
 public:
  // The first two operands are q and k.
  Attention(std::initializer_list<Bound> operands, Tensor lse, const Documents& documents,
            const CudnnCalls& calls, const AttentionScratch& scratch, bool backward,
            const Context& ctx)
      : operands_(operands),
        lse_(lse),
        documents_(documents),
        scratch_(scratch),
        backward_(backward),
        ctx_(ctx),
        batch_(operands_[0].tensor.dim(0)),
        time_(operands_[0].tensor.dim(1)),
        keys_(operands_[1].tensor.dim(1)),
        kv_heads_(operands_[1].tensor.dim(2)),
        group_(operands_[0].tensor.dim(2) / kv_heads_),
        library_(Library::OfCurrentDevice()),
        handle_(library_.OnStream(ctx.stream)),
        sequences_(calls.sequences),
        heads_(calls.kv_heads),
        queries_(calls.queries) {}

  // False, with nothing enqueued, when cuDNN takes none of it.
  bool Run() {
    for (const auto& [operand, tensor] : operands_) {
      if (reinterpret_cast<uintptr_t>(tensor.raw()) % 16 != 0) return false;
    }
    // Smaller calls where this version of cuDNN wants a larger workspace than is planned for.
    while (!Fits()) {
      if (!library_.PlanOf(KeyOf(sequences_, heads_, 0, queries_)).possible()) return false;
      if (sequences_ > 1) {
        sequences_ = (sequences_ + 1) / 2;
      } else if (heads_ > 1) {
        heads_ = (heads_ + 1) / 2;
      } else {
        return false;
      }
    }
    for (int64_t b = 0; b < batch_; b += sequences_) {
      const int64_t count = std::min(sequences_, batch_ - b);
      if (documents_.doc_start.defined()) {
        DocumentMask(scratch_.mask.Slice(0, 0, count), documents_, b, ctx_);
      }
      for (int64_t g = 0; g < kv_heads_; g += heads_) {
        const int64_t heads = std::min(heads_, kv_heads_ - g);
        queries_ == time_ ? Call(b, count, g, heads) : Blocks(b, g, heads);
      }
    }
    return true;
  }

 private:
  // What the strides of a call's tensors are: those of the operands, but blocks of queries have
  // packed gradients of keys and values.
  Key KeyOf(int64_t sequences, int64_t heads, int64_t first, int64_t queries) const {
    const Tensor q = operands_[0].tensor;
    Key key{.sequences = sequences,
            .queries = queries,
            .keys = keys_ - time_ + first + queries,
            .heads = heads * group_,
            .kv_heads = heads,
            .head_dim = q.dim(3),
            .documents = documents_.doc_start.defined(),
            .backward = backward_,
            .deterministic = backward_ && CudnnDeterministic(documents_.doc_start.defined(), ctx_)};
    for (const auto& [operand, t] : operands_) {
      auto& strides = key.strides[static_cast<size_t>(operand) - 1];
      strides = {t.stride(0), t.stride(1), t.stride(2)};
      if (queries < time_ && (operand == kDk || operand == kDv)) {
        strides = {keys_ * heads * q.dim(3), heads * q.dim(3), q.dim(3)};
      }
    }
    return key;
  }

  bool Fits() {
    for (const int64_t sequences : {sequences_, batch_ % sequences_}) {
      for (const int64_t heads : {heads_, kv_heads_ % heads_}) {
        for (int64_t first = 0; first < time_ && sequences * heads > 0; first += queries_) {
          const Key key = KeyOf(sequences, heads, first, std::min(queries_, time_ - first));
          const Plan& plan = library_.PlanOf(key);
          if (!plan.possible() || plan.workspace() > scratch_.workspace.bytes()) return false;
        }
      }
    }
    return true;
  }

  // Addresses of what belongs to the sequences, key heads and queries of a call.
  Pointers PointersOf(int64_t b, int64_t count, int64_t g, int64_t heads, int64_t first) const {
    Pointers pointers = {{kMask, scratch_.mask.raw()}};
    for (const auto& [operand, t] : operands_) {
      Tensor part = t.Slice(0, b, count);
      if (OfKeys(operand)) {
        part = part.Slice(2, g, heads);
      } else {
        part = part.Slice(2, g * group_, heads * group_).Slice(1, first, time_ - first);
      }
      pointers[operand] = part.raw();
    }
    pointers[kLse] = Lse(b, g);
    return pointers;
  }
  float* Lse(int64_t b, int64_t g) const {
    return lse_.device_data<float>() + (b * kv_heads_ + g) * group_ * time_;
  }

  void Call(int64_t b, int64_t count, int64_t g, int64_t heads) {
    library_.PlanOf(KeyOf(count, heads, 0, time_))
        .Run(handle_, PointersOf(b, count, g, heads, 0), scratch_.workspace.raw());
  }

  // The backward of some heads of a sequence by blocks of queries, the last of which sees all keys.
  // Each block's dk and dv are rounded to bf16 (cuDNN refuses f32 here), their sum once more: the
  // error of both becomes 2.02 roundings, from 1.74.
  void Blocks(int64_t b, int64_t g, int64_t heads) {
    const int64_t head_dim = operands_[0].tensor.dim(3), row = heads * head_dim;
    const auto rows_of = [&](const Tensor& all, int64_t i, int64_t keys) {
      return all.View({all.numel()}).Slice(0, i * keys_ * row, keys * row);
    };
    const int64_t last = (time_ - 1) / queries_ * queries_;
    for (int64_t first = last; first >= 0; first -= queries_) {
      const int64_t queries = std::min(queries_, time_ - first);
      const int64_t keys = keys_ - time_ + first + queries;
      Pointers pointers = PointersOf(b, 1, g, heads, first);
      KRAIT_CUDA_CHECK(
          cudaMemcpy2DAsync(scratch_.block_lse.raw(), static_cast<size_t>(queries) * 4,
                            Lse(b, g) + first, static_cast<size_t>(time_) * 4,
                            static_cast<size_t>(queries) * 4, static_cast<size_t>(heads * group_),
                            cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(ctx_.stream)));
      pointers[kLse] = scratch_.block_lse.raw();
      pointers[kDk] = rows_of(scratch_.block_part, 0, keys).raw();
      pointers[kDv] = rows_of(scratch_.block_part, 1, keys).raw();
      library_.PlanOf(KeyOf(1, heads, first, queries))
          .Run(handle_, pointers, scratch_.workspace.raw());
      for (int64_t i = 0; i < 2; ++i) {
        const Tensor sums = rows_of(scratch_.block_sums, i, keys);
        const Tensor part = rows_of(scratch_.block_part, i, keys);
        first == last ? Copy(sums, part, ctx_) : AddScaled(sums, part, 1, ctx_);
      }
    }
    for (const auto& [operand, t] : operands_) {
      if (operand != kDk && operand != kDv) continue;
      Copy(t.Slice(0, b, 1).Slice(2, g, heads),
           rows_of(scratch_.block_sums, operand == kDv, keys_).View({1, keys_, heads, head_dim}),
           ctx_);
    }
  }

  const std::vector<Bound> operands_;
  const Tensor lse_;
  const Documents& documents_;
  const AttentionScratch& scratch_;
  const bool backward_;
  const Context& ctx_;
  const int64_t batch_, time_, keys_, kv_heads_, group_;
  Library& library_;
  const cudnnHandle_t handle_;
  int64_t sequences_, heads_, queries_;  // of a call; heads_ counts key heads
};

}  // namespace

bool CudnnAttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                           const Documents& documents, const CudnnCalls& calls,
                           const AttentionScratch& scratch, const Context& ctx) {
  return Attention({{kQ, q}, {kK, k}, {kV, v}, {kY, y}}, lse, documents, calls, scratch,
                   /*backward=*/false, ctx)
      .Run();
}

bool CudnnAttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse,
                            Tensor q, Tensor k, Tensor v, const Documents& documents,
                            const CudnnCalls& calls, const AttentionScratch& scratch,
                            const Context& ctx) {
  return Attention({{kQ, q}, {kK, k}, {kV, v}, {kY, y}, {kDy, dy}, {kDq, dq}, {kDk, dk}, {kDv, dv}},
                   lse, documents, calls, scratch, /*backward=*/true, ctx)
      .Run();
}

}  // namespace krait::cuda
