// The resolved config as dotted keys and YAML values. Internal to this folder.
#ifndef KRAIT_TRAINER_CONFIG_CONFIG_PRINT_H_
#define KRAIT_TRAINER_CONFIG_CONFIG_PRINT_H_

#include <string>
#include <vector>

#include "trainer/config/config.h"
#include "trainer/config/config_tree.h"

namespace krait {

// A dotted key and its value as YAML.
struct ConfigEntry {
  std::string key, value;
  std::string comment;  // printed behind the value
};

// Every setting, in the order of the sections.
std::vector<ConfigEntry> Flatten(const RunConfig& config);

// The entries as nested maps.
std::string YamlText(const std::vector<ConfigEntry>& entries);

// Where the value of an entry came from: file:line:column, a word, a key that it is derived from,
// or the default (and what that is derived from).
std::string OriginOf(const ConfigNode& root, const ConfigEntry& entry);

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_CONFIG_PRINT_H_
