// Typed access to a config tree by dotted path. Asking for a key makes it known: at the end every
// key of the tree that nobody asked for is an error. Internal to the config reader.
#ifndef KRAIT_TRAINER_CONFIG_CONFIG_READER_H_
#define KRAIT_TRAINER_CONFIG_CONFIG_READER_H_

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "data/sampler.h"
#include "trainer/config/config_tree.h"

namespace krait {

// Bounds of a number.
struct Range {
  double min, max;
  bool min_open = false;  // min itself is excluded
  bool max_open = false;
};

class ConfigReader {
 public:
  // `complete` is false when a part of the config could not be read: a missing key is then no
  // error of its own.
  ConfigReader(const ConfigNode& root, bool complete, ConfigErrors* errors)
      : root_(root), complete_(complete), errors_(errors) {}
  bool complete() const { return complete_; }

  // Each leaves `*out` as it is when the key is absent or wrong.
  void Integer(const std::string& path, int64_t* out, int64_t min,
               int64_t max = std::numeric_limits<int64_t>::max());
  // As Integer, or the word `word`, which stands for `value`.
  void IntegerOr(const std::string& path, const char* word, int64_t value, int64_t* out,
                 int64_t min, int64_t max = std::numeric_limits<int64_t>::max());
  void Number(const std::string& path, double* out, const Range& range);
  void Bool(const std::string& path, bool* out);
  void String(const std::string& path, std::string* out);
  template <typename E>
  void Enum(const std::string& path, E* out,
            std::initializer_list<std::pair<const char*, E>> values);
  void NumberList(const std::string& path, std::initializer_list<double*> out, const Range& range);
  void Sources(const std::string& path, std::vector<SourceSpec>* out);

  // Makes a key known; null when absent or without a readable value.
  const ConfigNode* Find(const std::string& path);
  bool Has(const std::string& path) const;
  // Reports a missing key.
  void Require(const std::string& path, const std::string& hint = "");

  // Whether none of the keys has been reported as wrong or missing: a rule over several keys only
  // speaks when its keys are good.
  bool Good(std::initializer_list<const char*> paths) const;
  void Fail(const std::string& path, const std::string& message);
  // "model.d_model 4096" or "model.d_model 4096 (the default)".
  std::string Show(const std::string& path, const std::string& value) const;

  // Reports unknown keys, with the nearest known ones, and sections that are no maps.
  void Finish();

 private:
  const ConfigNode* Walk(const std::string& path) const;
  // The scalar text of a present, unquoted value; null after reporting anything else.
  const std::string* Plain(const std::string& path, const std::string& expected);
  void Wrong(const std::string& path, const ConfigNode& node, const std::string& expected);
  void CheckKeys(const ConfigNode& map, const std::string& prefix);
  void Unknown(const ConfigNode& node, const std::string& path,
               const std::vector<std::string>& siblings);
  // Of the key, else of the nearest section that is there.
  Place PlaceOf(const std::string& path) const;

  const ConfigNode& root_;
  bool complete_;
  ConfigErrors* errors_;
  std::vector<std::string> known_;  // in the order asked
  std::set<std::string> known_set_;
  std::set<std::string> bad_;
};

template <typename E>
void ConfigReader::Enum(const std::string& path, E* out,
                        std::initializer_list<std::pair<const char*, E>> values) {
  std::string expected;
  for (const auto& [name, value] : values) {
    absl::StrAppend(&expected, expected.empty() ? "" : " | ", name);
  }
  const ConfigNode* node = Find(path);
  if (node == nullptr) return;
  if (node->kind == ConfigNode::Kind::kScalar) {
    for (const auto& [name, value] : values) {
      if (node->text == name) {
        *out = value;
        return;
      }
    }
  }
  Wrong(path, *node, expected);
}

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_CONFIG_READER_H_
