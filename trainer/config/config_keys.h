// Every key of a config, named once: reading, printing and listing are visitors of VisitKeys.
// Internal to this folder.
#ifndef KRAIT_TRAINER_CONFIG_CONFIG_KEYS_H_
#define KRAIT_TRAINER_CONFIG_CONFIG_KEYS_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "trainer/config/config.h"

namespace krait {

struct ConfigKey {
  const char* path;     // "model.mamba.d_state"
  const char* meaning;  // one line
  const char* unit = "";
  // What stands for the default where it is no constant: "required", "heads".
  const char* default_text = nullptr;
  bool shown = true;  // whether the resolved config prints it
};

// Bounds of a whole number. `word`, where there is one, stands for `word_value`.
struct WholeRange {
  int64_t min;
  int64_t max = std::numeric_limits<int64_t>::max();
  const char* word = nullptr;
  int64_t word_value = 0;
};

// Bounds of a number. `word`, where there is one, stands for 0.
struct Range {
  double min, max;
  bool min_open = false;  // min itself is excluded
  bool max_open = false;
  const char* word = nullptr;
  bool count = false;  // values from 1 on are counts, those below shares
  // Whether it takes part in float32 arithmetic, where it must be neither 0 unless it is 0, nor
  // infinite, nor an excluded maximum.
  bool float32 = true;
};

class ConfigVisitor {
 public:
  virtual ~ConfigVisitor() = default;
  virtual void Whole(const ConfigKey& key, int64_t* value, const WholeRange& range) = 0;
  virtual void Number(const ConfigKey& key, double* value, const Range& range) = 0;
  virtual void Bool(const ConfigKey& key, bool* value) = 0;
  virtual void String(const ConfigKey& key, std::string* value) = 0;
  virtual void Choice(const ConfigKey& key, const std::vector<const char*>& names,
                      size_t* index) = 0;
  virtual void Numbers(const ConfigKey& key, const std::vector<double*>& values,
                       const Range& range) = 0;
  virtual void Sources(const ConfigKey& key, std::vector<SourceSpec>* value) = 0;
  virtual void Ramp(const ConfigKey& key, BatchRamp* value) = 0;

  // `names` in the order of the enumerators, which count from 0.
  template <typename E>
  void Enum(const ConfigKey& key, E* value, const std::vector<const char*>& names) {
    auto index = static_cast<size_t>(*value);
    Choice(key, names, &index);
    *value = static_cast<E>(index);
  }
};

// What a config says that RunConfig holds in another form.
struct ConfigDraft {
  std::string pattern;                     // RunConfig: model.sublayers
  std::string ratio = "1:7";               // likewise, with the next three
  int64_t mixer_offset = -1;               // -1: the rule's default
  int64_t moe_every = 0, moe_offset = -1;  // 0: dense
  double decay_steps = 0.1;                // RunConfig: a count
};

// Shows `visitor` every key with its place in `config` or `draft`, in the order of the resolved
// config.
void VisitKeys(RunConfig* config, ConfigDraft* draft, ConfigVisitor* visitor);

// The words of a model.pattern.
int64_t PatternWords(const std::string& pattern);

// Bounds that rules over several keys need too. Far above any model, and small enough for every
// product of sizes to fit in 64 bits.
inline constexpr int64_t kMaxWidth = 1 << 20;
inline constexpr int64_t kMaxLayers = 1000;
inline constexpr int64_t kMaxPeriod = 1000;
inline constexpr int64_t kMaxSteps = 1'000'000'000'000;
inline constexpr int64_t kMaxTokens = 1'000'000'000'000'000;

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_CONFIG_KEYS_H_
