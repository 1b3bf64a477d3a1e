// The YAML of a config as a tree with the place of every key and value, before it has types.
// Internal to the config reader.
#ifndef KRAIT_TRAINER_CONFIG_CONFIG_TREE_H_
#define KRAIT_TRAINER_CONFIG_CONFIG_TREE_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

// Where a key or value stands: file:line:column (from 1), a word of the command line, or a file as
// a whole.
struct Place {
  std::shared_ptr<const std::string> source;  // path, or the word
  int layer = 0;                              // order of reading
  int line = 0;                               // 0: a word; -1: the file as a whole
  int column = 0;
  std::string ToString() const;
};

// Text of a user inside a message: quoted, control characters escaped, long text cut.
std::string Quote(std::string_view text);

// Errors with their places, reported in reading order; and notes: what has no effect, but is no
// mistake for certain.
class ConfigErrors {
 public:
  void Add(const Place& place, const std::string& message);
  void Note(const Place& place, const std::string& message);
  const std::vector<std::string>& notes() const { return notes_; }  // "PLACE: message"
  bool empty() const { return errors_.empty(); }
  // One line per error; kConfig.
  absl::Status ToStatus() const;

 private:
  struct Item {
    Place place;
    std::string message;
  };
  std::vector<Item> errors_;
  std::vector<std::string> notes_;
  int64_t dropped_ = 0;
};

struct ConfigNode {
  enum class Kind : uint8_t {
    kNull,  // a key without a value
    kScalar,
    kList,
    kMap,
    kBroken,  // an error was reported here already
  };
  Kind kind = Kind::kNull;
  Place place;
  std::string text;     // of a scalar
  bool quoted = false;  // "text", 'text' or a block scalar
  std::string key;      // of an entry of a map
  Place key_place;
  std::vector<ConfigNode> children;  // items of a list, entries of a map

  bool is_map() const { return kind == Kind::kMap; }
  const ConfigNode* Find(std::string_view name) const;  // entry of a map, or null
  ConfigNode* Find(std::string_view name);
  bool Erase(std::string_view name);
};

// The node at a dotted path below `root`, or null.
const ConfigNode* FindNode(const ConfigNode& root, std::string_view path);

// For messages: "a list", "a map", "no value", or the quoted text of a scalar.
std::string Describe(const ConfigNode& node);

// The one document of a YAML text. Reported: syntax, encoding, duplicate keys, anchors, aliases,
// tags, merge keys, several documents, too deep or too many values. Returns false when nothing
// could be made of the text. The root is a map (an empty text is an empty map) unless `any_root`.
// A word's text has place.line 0: its nodes all have the word's place. Keys with dots are errors,
// unless `dotted_keys` (sweeps).
bool ParseYaml(const std::string& text, const Place& origin, bool any_root, ConfigNode* root,
               ConfigErrors* errors, bool dotted_keys = false);

// What LoadConfig reads: base files, the file, the words. Returns false when a file or word could
// not be read; the tree then holds the rest, and missing keys mean nothing. `root->place` is the
// file's first character.
bool LoadLayers(const std::string& path, const std::vector<std::string>& words, ConfigNode* root,
                ConfigErrors* errors, bool dotted_keys = false);
// The same for a text that stands alone (no base files).
bool LoadText(const std::string& text, const std::string& name,
              const std::vector<std::string>& words, ConfigNode* root, ConfigErrors* errors);

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_CONFIG_TREE_H_
