#include "trainer/config/sweep.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/number.h"
#include "kernels/base/shell.h"
#include "trainer/config/config_reader.h"
#include "trainer/config/config_tree.h"

namespace krait {
namespace {

constexpr size_t kMaxCells = 1000;
constexpr char kCase[] = "case";

// YAML that reads back to the node; without line breaks.
std::string YamlOf(const ConfigNode& node) {
  std::vector<std::string> parts;
  switch (node.kind) {
    case ConfigNode::Kind::kList:
      for (const ConfigNode& item : node.children) parts.push_back(YamlOf(item));
      return absl::StrCat("[", absl::StrJoin(parts, ", "), "]");
    case ConfigNode::Kind::kMap:
      for (const ConfigNode& child : node.children) {
        parts.push_back(absl::StrCat(child.key, ": ", YamlOf(child)));
      }
      return absl::StrCat("{", absl::StrJoin(parts, ", "), "}");
    case ConfigNode::Kind::kScalar:
      break;
    default:
      return "";
  }
  const bool plain = !node.quoted && node.text.find_first_of(",[]{}#\"'\n") == std::string::npos;
  if (plain) return node.text;
  std::string text = "\"";
  for (const char c : node.text) {
    if (c == '"' || c == '\\') text += '\\';
    text += c == '\n' ? "\\n" : std::string(1, c);
  }
  return text + "\"";
}

// For names of cells: the scalar, "[a, b]", or "key value key value".
std::string Spoken(const ConfigNode& node) {
  if (node.kind == ConfigNode::Kind::kScalar) return node.text;
  if (!node.is_map()) return YamlOf(node);
  std::vector<std::string> parts;
  for (const ConfigNode& child : node.children) {
    parts.push_back(absl::StrCat(child.key, " ", Spoken(child)));
  }
  return absl::StrJoin(parts, " ");
}

// A setting for every leaf at or below the node, whose key is `key`.
void Leaves(const std::string& key, const ConfigNode& node, std::vector<SweepSetting>* settings) {
  if (node.is_map()) {
    for (const ConfigNode& child : node.children) {
      Leaves(absl::StrCat(key, ".", child.key), child, settings);
    }
  } else if (node.kind != ConfigNode::Kind::kBroken) {
    settings->push_back({key, YamlOf(node), node.place.ToString()});
  }
}

void Put(const SweepSetting& setting, std::vector<SweepSetting>* settings) {
  const auto same = std::find_if(settings->begin(), settings->end(),
                                 [&](const SweepSetting& s) { return s.key == setting.key; });
  if (same == settings->end()) {
    settings->push_back(setting);
  } else {
    *same = setting;
  }
}

// A key of the grid, or `case`, with its values.
struct Axis {
  std::string key = {}, label = {};
  std::vector<std::string> names = {};                   // of the values
  std::vector<std::vector<SweepSetting>> settings = {};  // of each value
  Place place = {};
};

class SweepReader {
 public:
  SweepReader(const ConfigNode& root, bool complete, ConfigErrors* errors)
      : reader_(root, complete, errors), root_(root), errors_(errors) {}

  void Read(Sweep* sweep) {
    reader_.Find("base");
    reader_.String("title", &sweep->title);
    reader_.String("out", &sweep->out);
    sweep->out = UserPath(sweep->out);
    reader_.String("metric", &sweep->metric);
    ReadConfig(sweep);
    if (const ConfigNode* grid = reader_.Find("grid"); grid != nullptr) ReadGrid("", *grid);
    if (const ConfigNode* cases = reader_.Find("cases"); cases != nullptr) ReadCases(*cases);
    Label();
    ReadSeeds(sweep);
    ReadEqual(sweep);
    MakeCells(sweep);
    ReadBaseline(sweep);
    reader_.Finish();
  }

 private:
  void Fail(const Place& place, const std::string& message) { errors_->Add(place, message); }

  void ReadConfig(Sweep* sweep) {
    reader_.Require("config", "it names the YAML file of the base config");
    reader_.String("config", &sweep->config);
    const ConfigNode* node = reader_.Find("config");
    if (node == nullptr || sweep->config.empty()) return;
    // Relative to the file that names it; a word of the command line to the working folder.
    sweep->config = UserPath(sweep->config);
    if (node->place.line > 0) {
      const std::filesystem::path folder = std::filesystem::path(*node->place.source).parent_path();
      sweep->config = (folder / sweep->config).lexically_normal().string();
    }
  }

  // A list is an axis; a map leads to longer keys.
  void ReadGrid(const std::string& key, const ConfigNode& node) {
    if (node.is_map()) {
      for (const ConfigNode& child : node.children) {
        ReadGrid(key.empty() ? child.key : absl::StrCat(key, ".", child.key), child);
      }
      return;
    }
    if (node.kind == ConfigNode::Kind::kBroken) return;
    const std::string what = key.empty() ? "grid" : absl::StrCat("grid: ", key);
    if (node.kind != ConfigNode::Kind::kList || node.children.empty()) {
      return Fail(
          node.place,
          absl::StrCat(what, ": expected ",
                       key.empty() ? "a map of config keys to lists of values" : "a list of values",
                       ", found ",
                       node.children.empty() && node.kind == ConfigNode::Kind::kList
                           ? "an empty list"
                           : Describe(node)));
    }
    Axis axis{.key = key, .place = node.key_place};
    for (const ConfigNode& value : node.children) {
      std::vector<SweepSetting> settings;
      Leaves(key, value, &settings);
      Add(Spoken(value), std::move(settings), value.place, &axis);
    }
    AddAxis(std::move(axis));
  }

  void ReadCases(const ConfigNode& node) {
    if (!node.is_map() || node.children.empty()) {
      return Fail(node.place, absl::StrCat("cases: expected a map of names to maps of config keys, "
                                           "found ",
                                           Describe(node)));
    }
    Axis axis{.key = kCase, .place = node.key_place};
    for (const ConfigNode& child : node.children) {
      std::vector<SweepSetting> settings;
      if (child.is_map()) {
        for (const ConfigNode& entry : child.children) Leaves(entry.key, entry, &settings);
      } else if (child.kind != ConfigNode::Kind::kNull) {  // a case without settings is the base
        Fail(child.place,
             absl::StrCat("cases: ", child.key, ": expected a map of config keys to values, found ",
                          Describe(child)));
      }
      Add(child.key, std::move(settings), child.key_place, &axis);
    }
    AddAxis(std::move(axis));
  }

  void Add(const std::string& name, std::vector<SweepSetting> settings, const Place& place,
           Axis* axis) {
    if (std::find(axis->names.begin(), axis->names.end(), name) != axis->names.end()) {
      return Fail(place, absl::StrCat(axis->key, " has ", Quote(name), " twice"));
    }
    for (const SweepSetting& setting : settings) {
      if (setting.key == "run_dir" || setting.key == "train.seed" || setting.key == "base") {
        Fail(place, absl::StrCat(setting.key, " is set by the sweep itself",
                                 setting.key == "train.seed" ? ": give seeds instead" : ""));
      }
    }
    axis->names.push_back(name);
    axis->settings.push_back(std::move(settings));
  }

  void AddAxis(Axis axis) {
    for (const Axis& other : axes_) {
      if (other.key == axis.key) {
        return Fail(axis.place, absl::StrCat("grid: ", axis.key, " is given twice, also at ",
                                             other.place.ToString()));
      }
    }
    axes_.push_back(std::move(axis));
  }

  // The shortest end of a key that no other axis has.
  void Label() {
    for (Axis& axis : axes_) {
      size_t dot = axis.key.size();
      const auto shared = [&](const std::string& label) {
        return std::any_of(axes_.begin(), axes_.end(), [&](const Axis& other) {
          return &other != &axis && (other.key == label || other.key.ends_with("." + label));
        });
      };
      do {
        dot = axis.key.rfind('.', dot - 1);
        axis.label = dot == std::string::npos ? axis.key : axis.key.substr(dot + 1);
      } while (dot != std::string::npos && dot > 0 && shared(axis.label));
    }
  }

  void ReadSeeds(Sweep* sweep) {
    const ConfigNode* node = reader_.Find("seeds");
    if (node == nullptr) return;
    const std::string expected = "a list of whole numbers such as [1, 2, 3]";
    if (node->kind != ConfigNode::Kind::kList || node->children.empty()) {
      return Fail(
          node->place,
          absl::StrCat("seeds: expected ", expected, ", found ",
                       node->kind == ConfigNode::Kind::kList ? "an empty list" : Describe(*node)));
    }
    for (const ConfigNode& item : node->children) {
      const auto seed = item.kind == ConfigNode::Kind::kScalar && !item.quoted
                            ? ParseInteger(item.text)
                            : std::nullopt;
      if (!seed.has_value() || *seed < 0) {
        Fail(item.place, absl::StrCat("seeds: expected ", expected, ", found ", Describe(item)));
      } else if (std::find(sweep->seeds.begin(), sweep->seeds.end(), *seed) != sweep->seeds.end()) {
        Fail(item.place, absl::StrCat("seeds: ", *seed, " is given twice"));
      } else {
        sweep->seeds.push_back(*seed);
      }
    }
  }

  template <typename Kind>
  void ReadQuantity(const char* name, Kind kind, Equal<Kind>* equal) {
    const std::string path = absl::StrCat("equal.", name);
    const ConfigNode* node = reader_.Find(path);
    if (node == nullptr) return;
    if (equal->kind != Kind::kNone) {
      return Fail(node->key_place, absl::StrCat(path, " and the one at ", equal->place,
                                                " are alternatives: keep one of them"));
    }
    equal->kind = kind;
    equal->place = node->place.ToString();
    if (node->text == "baseline") {
      if constexpr (std::is_same_v<Kind, EqualSteps>) {
        if (kind == Kind::kSeconds) {
          Fail(node->place,
               "equal.seconds: expected a number of seconds: how long the baseline "
               "takes is not known before");
        }
      }
      return;
    }
    double value = 0;
    reader_.Number(path, &value,
                   {.min = 0,
                    .max = std::numeric_limits<double>::max(),
                    .min_open = true,
                    .word = "baseline",
                    .float32 = false});
    equal->value = value;
  }

  void ReadEqual(Sweep* sweep) {
    ReadQuantity("tokens", EqualSteps::kTokens, &sweep->steps);
    ReadQuantity("flops", EqualSteps::kFlops, &sweep->steps);
    ReadQuantity("seconds", EqualSteps::kSeconds, &sweep->steps);
    ReadQuantity("active_params", EqualSize::kActive, &sweep->size);
    ReadQuantity("total_params", EqualSize::kTotal, &sweep->size);
  }

  // Which value of each axis a map of keys to values names: a scalar, or where `lists` a list of
  // several. False after an error.
  bool Match(const std::string& what, const ConfigNode& map, bool lists,
             std::vector<std::pair<size_t, std::set<size_t>>>* wanted) {
    bool good = true;
    for (const ConfigNode& entry : map.children) {
      const auto axis = std::find_if(axes_.begin(), axes_.end(), [&](const Axis& a) {
        return a.key == entry.key || a.label == entry.key;
      });
      if (axis == axes_.end()) {
        std::vector<std::string> keys;
        for (const Axis& a : axes_) keys.push_back(a.key);
        Fail(entry.key_place,
             absl::StrCat(what, ": ", Quote(entry.key),
                          " does not vary in this sweep; what does: ", absl::StrJoin(keys, ", ")));
        good = false;
        continue;
      }
      std::set<size_t> values;
      const auto one = [&](const ConfigNode& node) {
        const auto name = std::find(axis->names.begin(), axis->names.end(), Spoken(node));
        if (name == axis->names.end()) {
          Fail(node.place,
               absl::StrCat(what, ": ", axis->key, " has no value ", Quote(Spoken(node)),
                            "; it has ", absl::StrJoin(axis->names, ", ")));
          good = false;
        } else {
          values.insert(static_cast<size_t>(name - axis->names.begin()));
        }
      };
      if (lists && entry.kind == ConfigNode::Kind::kList) {
        for (const ConfigNode& item : entry.children) one(item);
      } else {
        one(entry);
      }
      wanted->push_back({static_cast<size_t>(axis - axes_.begin()), values});
    }
    return good;
  }

  static bool Fits(const std::vector<std::pair<size_t, std::set<size_t>>>& wanted,
                   const std::vector<size_t>& choice) {
    return std::all_of(wanted.begin(), wanted.end(),
                       [&](const auto& want) { return want.second.contains(choice[want.first]); });
  }

  void MakeCells(Sweep* sweep) {
    std::vector<std::vector<std::pair<size_t, std::set<size_t>>>> excluded;
    if (const ConfigNode* node = reader_.Find("exclude"); node != nullptr) {
      const std::string expected =
          "a list of combinations such as [{model.mixer.ratio: \"1:0\", model.moe.every: [1, 2]}]";
      if (node->kind != ConfigNode::Kind::kList) {
        Fail(node->place,
             absl::StrCat("exclude: expected ", expected, ", found ", Describe(*node)));
      }
      for (const ConfigNode& item : node->children) {
        if (node->kind != ConfigNode::Kind::kList) break;
        excluded.emplace_back();
        if (!item.is_map() || item.children.empty()) {
          Fail(item.place,
               absl::StrCat("exclude: expected ", expected, ", found ", Describe(item)));
          excluded.pop_back();
        } else if (!Match("exclude", item, /*lists=*/true, &excluded.back())) {
          excluded.pop_back();
        }
      }
    }
    std::vector<size_t> choice(axes_.size(), 0);
    size_t combinations = 1;
    for (const Axis& axis : axes_) {
      combinations *= axis.names.size();
      if (combinations > kMaxCells) {
        return Fail(axis.place, absl::StrCat("the sweep has more than ", kMaxCells,
                                             " combinations: fewer values, please"));
      }
    }
    for (size_t n = 0; n < combinations; ++n) {
      size_t rest = n;
      for (size_t a = axes_.size(); a-- > 0;) {  // the last axis varies fastest
        choice[a] = rest % axes_[a].names.size();
        rest /= axes_[a].names.size();
      }
      if (std::any_of(excluded.begin(), excluded.end(),
                      [&](const auto& wanted) { return Fits(wanted, choice); })) {
        continue;
      }
      SweepCell cell;
      for (size_t a = 0; a < axes_.size(); ++a) {
        const Axis& axis = axes_[a];
        for (const SweepSetting& setting : axis.settings[choice[a]]) Put(setting, &cell.settings);
        if (axis.names.size() < 2) continue;
        absl::StrAppend(&cell.name, cell.name.empty() ? "" : ", ",
                        axis.key == kCase ? "" : axis.label + " ", axis.names[choice[a]]);
      }
      if (cell.name.empty()) cell.name = "base";
      sweep->cells.push_back(std::move(cell));
      choices_.push_back(choice);
    }
    if (sweep->cells.empty() && errors_->empty()) {
      Fail(root_.Find("exclude")->place, "exclude: no combination is left");
    }
  }

  void ReadBaseline(Sweep* sweep) {
    const ConfigNode* node = reader_.Find("baseline");
    if (node == nullptr || sweep->cells.empty()) return;
    std::vector<std::pair<size_t, std::set<size_t>>> wanted;
    ConfigNode by_case = *node;
    if (node->kind == ConfigNode::Kind::kScalar) {  // the name of a case
      by_case.kind = ConfigNode::Kind::kMap;
      by_case.children = {*node};
      by_case.children.front().key = kCase;
    }
    if (!by_case.is_map()) {
      return Fail(node->place, absl::StrCat("baseline: expected the keys and values of one cell "
                                            "such as {model.mixer.ratio: \"1:7\"}, found ",
                                            Describe(*node)));
    }
    if (!Match("baseline", by_case, /*lists=*/false, &wanted)) return;
    std::vector<size_t> found;
    for (size_t i = 0; i < choices_.size(); ++i) {
      if (Fits(wanted, choices_[i])) found.push_back(i);
    }
    if (found.empty()) {
      Fail(node->place, "baseline: this combination is excluded");
    } else if (found.size() > 1) {
      Fail(node->place, absl::StrCat("baseline: ", found.size(), " cells fit this: ",
                                     sweep->cells[found[0]].name, "; ", sweep->cells[found[1]].name,
                                     found.size() > 2 ? "; ..." : "", ": name one"));
    } else {
      sweep->baseline = found.front();
    }
  }

  ConfigReader reader_;
  const ConfigNode& root_;
  ConfigErrors* errors_;
  std::vector<Axis> axes_;
  std::vector<std::vector<size_t>> choices_;  // of each cell, a value of each axis
};

}  // namespace

absl::StatusOr<Sweep> LoadSweep(const std::string& path, const std::vector<std::string>& words) {
  ConfigErrors errors;
  ConfigNode root;
  const bool complete = LoadLayers(path, words, &root, &errors, /*dotted_keys=*/true);
  Sweep sweep;
  sweep.path = path;
  const std::string stem = std::filesystem::path(path).stem().string();
  sweep.title = stem;
  sweep.out = absl::StrCat("runs/", stem);
  if (!complete) return errors.ToStatus();
  SweepReader reader(root, complete, &errors);
  reader.Read(&sweep);
  if (!errors.empty()) return errors.ToStatus();
  return sweep;
}

absl::StatusOr<RunConfig> LoadCell(const Sweep& sweep, const std::vector<SweepSetting>& settings,
                                   int64_t ranks) {
  std::vector<std::string> words;
  for (const SweepSetting& setting : settings) words.push_back(setting.Word());
  auto config = LoadConfig(sweep.config, words, ConfigUse::kTrain, ranks);
  if (config.ok()) return config;
  // Places that are words of the command line to the reader are places of the sweep to the user.
  std::istringstream lines(MessageOf(config.status()));
  std::vector<std::string> told;
  for (std::string line; std::getline(lines, line);) {
    for (const SweepSetting& setting : settings) {
      const std::string place = absl::StrCat("word ", Quote(setting.Word()));
      if (line.starts_with(place)) line = setting.place + line.substr(place.size());
    }
    told.push_back(line);
  }
  return Error(ExitCodeOf(config.status()), absl::StrJoin(told, "\n"));
}

}  // namespace krait
