// Small checkpoints for tests: state whose content is a function of the step.
#ifndef KRAIT_TESTS_TRAINER_CHECKPOINT_CHECKPOINT_TESTING_H_
#define KRAIT_TESTS_TRAINER_CHECKPOINT_CHECKPOINT_TESTING_H_

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait::testing_checkpoint {

// For tests with many saves: in memory where that is possible, so that fsync is free.
inline std::string TempFolder(const std::string& name) {
  const std::string base = access("/dev/shm", W_OK) == 0 ? "/dev/shm/" : "/tmp/";
  return base + name + "_" + std::to_string(getpid());
}

// Boxes and the memory behind them.
struct State {
  std::vector<CheckpointBox> boxes;
  std::vector<std::vector<char>> memory;

  State() = default;
  State(State&&) = default;  // the memory's addresses survive a move, not a copy
  State& operator=(State&&) = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  void Add(const std::string& slot, const std::string& name, DType dtype,
           const std::vector<int64_t>& shape, const std::vector<int64_t>& offset,
           const std::vector<int64_t>& extent) {
    boxes.push_back({slot, name, dtype, shape, offset, extent, nullptr});
    memory.emplace_back(static_cast<size_t>(boxes.back().bytes()));
    boxes.back().data = memory.back().data();
  }
  void AddWhole(const std::string& slot, const std::string& name, DType dtype,
                const std::vector<int64_t>& shape) {
    Add(slot, name, dtype, shape, std::vector<int64_t>(shape.size(), 0), shape);
  }
};

inline uint64_t Mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// The element of a tensor at a flat global index: 16 or more random bits of (step, slot, name,
// index), in the upper bits so that bf16 and f32 agree.
inline uint64_t ElementKey(int64_t step, const std::string& slot, const std::string& name) {
  uint64_t key = Mix(static_cast<uint64_t>(step) + 1);
  for (const char c : slot + "/" + name) key = Mix(key ^ static_cast<unsigned char>(c));
  return key;
}
inline uint64_t Element(int64_t step, const std::string& slot, const std::string& name,
                        int64_t index) {
  return Mix(ElementKey(step, slot, name) ^ static_cast<uint64_t>(index));
}

// Calls fn(global flat index, pointer to the element) for the box's elements in order.
template <typename Fn>
void ForElements(const CheckpointBox& box, const Fn& fn) {
  const int64_t width = SizeOf(box.dtype);
  const int64_t count = box.bytes() / width;
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i, global = 0, stride = 1;
    for (size_t d = box.shape.size(); d-- > 0;) {
      global += (box.offset[d] + rest % box.extent[d]) * stride;
      rest /= box.extent[d];
      stride *= box.shape[d];
    }
    fn(global, static_cast<char*>(box.data) + i * width);
  }
}

inline void Fill(int64_t step, State* state) {
  for (const CheckpointBox& box : state->boxes) {
    const uint64_t key = ElementKey(step, box.slot, box.name);
    ForElements(box, [&](int64_t global, char* at) {
      const uint64_t value = Mix(key ^ static_cast<uint64_t>(global));
      std::memcpy(at, &value, static_cast<size_t>(SizeOf(box.dtype)));
    });
  }
}

// True when every element is that of `step`.
inline bool Holds(int64_t step, const State& state) {
  bool equal = true;
  for (const CheckpointBox& box : state.boxes) {
    const uint64_t key = ElementKey(step, box.slot, box.name);
    ForElements(box, [&](int64_t global, char* at) {
      const uint64_t value = Mix(key ^ static_cast<uint64_t>(global));
      equal = equal && std::memcmp(at, &value, static_cast<size_t>(SizeOf(box.dtype))) == 0;
    });
  }
  return equal;
}

// A little model: weights and moments, several boxes, f32 and bf16. `scale` multiplies the rows.
inline State SmallState(int64_t scale = 1) {
  State state;
  const int64_t rows = 6 * scale;
  for (const std::string slot : {"weight", "exp_avg", "exp_avg_sq"}) {
    const DType dtype = slot == "weight" ? DType::kF32 : DType::kBF16;
    state.AddWhole(slot, "model.embed_tokens.weight", dtype, {rows, 10});
    // Two boxes of in_proj, as a tensor rank with half of x and half of z would write them.
    state.Add(slot, "model.layers.0.mamba.in_proj.weight", dtype, {rows, 5}, {0, 0}, {rows / 2, 5});
    state.Add(slot, "model.layers.0.mamba.in_proj.weight", dtype, {rows, 5}, {rows / 2, 0},
              {rows - rows / 2, 5});
    state.AddWhole(slot, "model.layers.0.input_layernorm.weight", dtype, {7});
  }
  return state;
}

inline CheckpointMeta SmallMeta(int64_t step) {
  CheckpointMeta meta;
  meta.step = step;
  meta.adam_steps = step;
  meta.sequences = 8 * step;
  meta.tokens = 512 * step;
  meta.data_fingerprint = "train.h5 0123456789abcdef";
  meta.mix_start = step;
  meta.sources = {
      {"0123456789abcdef", "train.h5", 0.1, 0, 64, 1, 7 * step + 6, {{0, 1234}, {5, 7}}},
      {"fedcba9876543210", "old.h5", 0, 3, 32, 0, 2, {{0, 1234}}}};
  meta.validation = {"00112233aabbccdd"};
  meta.config_yaml = "model:\n  d_model: 4  # \"quoted\", \\ and \xC3\xA9\n";
  meta.tokenizer = "bytes";
  return meta;
}

}  // namespace krait::testing_checkpoint

#endif  // KRAIT_TESTS_TRAINER_CHECKPOINT_CHECKPOINT_TESTING_H_
