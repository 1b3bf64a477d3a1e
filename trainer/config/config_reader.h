// Typed access to a config tree by dotted path. Asking for a key makes it known: at the end every
// key of the tree that nobody asked for is an error. Internal to the config reader.
#ifndef KRAIT_TRAINER_CONFIG_CONFIG_READER_H_
#define KRAIT_TRAINER_CONFIG_CONFIG_READER_H_

#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>
#include <vector>

#include "data/sampler.h"
#include "trainer/config/config_keys.h"
#include "trainer/config/config_tree.h"

namespace krait {

class ConfigReader {
 public:
  // `complete` is false when a part of the config could not be read: a missing key is then no
  // error of its own.
  ConfigReader(const ConfigNode& root, bool complete, ConfigErrors* errors)
      : root_(root), complete_(complete), errors_(errors) {}
  bool complete() const { return complete_; }

  // Each leaves `*out` as it is when the key is absent or wrong.
  void Whole(const std::string& path, int64_t* out, const WholeRange& range);
  void Number(const std::string& path, double* out, const Range& range);
  void Bool(const std::string& path, bool* out);
  void String(const std::string& path, std::string* out);
  // `index` into `names`.
  void Choice(const std::string& path, const std::vector<const char*>& names, size_t* index);
  void Numbers(const std::string& path, const std::vector<double*>& out, const Range& range);
  void Sources(const std::string& path, std::vector<SourceSpec>* out);
  void Ramp(const std::string& path, BatchRamp* out);

  // Makes a key known; null when absent or without a readable value.
  const ConfigNode* Find(const std::string& path);
  bool Has(const std::string& path) const;
  // Reports a missing key.
  void Require(const std::string& path, const std::string& hint = "");

  // Whether none of the keys has been reported as wrong or missing: a rule over several keys only
  // speaks when its keys are good.
  bool Good(std::initializer_list<const char*> paths) const;
  void Fail(const std::string& path, const std::string& message);
  void Note(const std::string& path, const std::string& message);
  // The first key in the section that is given and not among `but`, dotted; "" when there is none.
  std::string FirstGiven(const std::string& section,
                         const std::vector<std::string>& but = {}) const;
  // The text of a scalar, "" when there is none.
  std::string TextOf(const std::string& path) const;
  // "model.d_model 4096" or "model.d_model 4096 (the default)".
  std::string Show(const std::string& path, const std::string& value) const;

  // Reports unknown keys, with the nearest known ones, and sections that are no maps.
  void Finish();

 private:
  // The task of an entry of `list` that has `synthetic`.
  void Synthetic(const std::string& list, SourceSpec* source);
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

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_CONFIG_READER_H_
