#include "trainer/config/config_tree.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <exception>
#include <sstream>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/utf8.h"

namespace krait {
namespace {

constexpr int kMaxDepth = 32;
constexpr int64_t kMaxNodes = 100'000;
constexpr size_t kMaxErrors = 100;

// Ends the parse; the error has been reported.
struct StopParsing {};

Place At(const Place& origin, const YAML::Mark& mark) {
  Place place = origin;
  if (origin.line == 0) return place;
  place.line = std::max(mark.line, 0) + 1;
  place.column = std::max(mark.column, 0) + 1;
  return place;
}

bool IsUtf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text, i);
    if (length == 0) return false;
    i += length;
  }
  return true;
}

class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(const Place& origin, bool dotted_keys, ConfigErrors* errors)
      : origin_(origin), dotted_keys_(dotted_keys), errors_(errors) {
    root_.place = origin;
  }

  ConfigNode TakeRoot() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ == 1) return;
    errors_->Add(At(origin_, mark), "a second document begins here; a config is one document");
    throw StopParsing();
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    Put(Make(ConfigNode::Kind::kNull, mark, "?", anchor));
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t /*anchor*/) override {
    errors_->Add(At(origin_, mark), "aliases (*name) are not supported; write the value out");
    Put(Make(ConfigNode::Kind::kBroken, mark, "?", 0));
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    ConfigNode node = Make(ConfigNode::Kind::kScalar, mark, tag, anchor);
    node.text = value;
    node.quoted = tag == "!";
    if (!IsUtf8(value)) {  // by an escape such as "\x80"
      errors_->Add(node.place, "an escape in this text yields a byte that is not UTF-8");
      node.kind = ConfigNode::Kind::kBroken;
    }
    Put(std::move(node));
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value /*style*/) override {
    Push(Make(ConfigNode::Kind::kList, mark, tag, anchor));
  }
  void OnSequenceEnd() override { Pop(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value /*style*/) override {
    Push(Make(ConfigNode::Kind::kMap, mark, tag, anchor));
  }
  void OnMapEnd() override { Pop(); }

 private:
  // A list or map that is being filled.
  struct Frame {
    ConfigNode node;
    bool has_key = false;  // of a map: the next value belongs to `key`
    bool keep = false;     // the key is good
    std::string key;
    Place key_place;
    std::unordered_map<std::string, Place> seen;
  };

  ConfigNode Make(ConfigNode::Kind kind, const YAML::Mark& mark, const std::string& tag,
                  YAML::anchor_t anchor) {
    ConfigNode node;
    node.kind = kind;
    node.place = At(origin_, mark);
    if (++nodes_ > kMaxNodes) {
      errors_->Add(node.place, absl::StrCat("more than ", kMaxNodes, " values"));
      throw StopParsing();
    }
    if (anchor != 0) {
      errors_->Add(node.place, "anchors (&name) are not supported; write the value out");
    }
    if (!tag.empty() && tag != "?" && tag != "!") {
      errors_->Add(node.place, absl::StrCat("tags (", Quote(tag), ") are not supported"));
    }
    return node;
  }

  void Push(ConfigNode node) {
    if (stack_.size() == kMaxDepth) {
      errors_->Add(node.place, absl::StrCat("nested more than ", kMaxDepth, " levels deep"));
      throw StopParsing();
    }
    stack_.emplace_back().node = std::move(node);
  }

  void Pop() {
    ConfigNode node = std::move(stack_.back().node);
    stack_.pop_back();
    Put(std::move(node));
  }

  void Put(ConfigNode node) {
    if (stack_.empty()) {
      root_ = std::move(node);
      return;
    }
    Frame& frame = stack_.back();
    if (frame.node.kind == ConfigNode::Kind::kList) {
      frame.node.children.push_back(std::move(node));
    } else if (!frame.has_key) {
      TakeKey(&frame, node);
    } else {
      frame.has_key = false;
      if (!frame.keep) return;
      node.key = std::move(frame.key);
      node.key_place = frame.key_place;
      // The parser puts a missing value where the next token stands.
      if (node.kind == ConfigNode::Kind::kNull) node.place = node.key_place;
      frame.node.children.push_back(std::move(node));
    }
  }

  void TakeKey(Frame* frame, const ConfigNode& node) {
    frame->has_key = true;
    frame->keep = false;
    frame->key_place = node.place;
    if (node.kind == ConfigNode::Kind::kBroken) return;
    if (node.kind != ConfigNode::Kind::kScalar || node.text.empty()) {
      errors_->Add(node.place, absl::StrCat("a key must be a word, found ", Describe(node)));
      return;
    }
    if (node.text == "<<") {
      errors_->Add(node.place, "merge keys (<<) are not supported; use base: FILE");
      return;
    }
    if (!dotted_keys_ && node.text.find('.') != std::string::npos) {
      errors_->Add(node.place, absl::StrCat("key ", Quote(node.text),
                                            ": dotted keys belong on the command line; in a file "
                                            "write the parts as nested maps"));
      return;
    }
    const auto [first, inserted] = frame->seen.emplace(node.text, node.place);
    if (!inserted) {
      errors_->Add(node.place, absl::StrCat("duplicate key ", Quote(node.text), ", first given at ",
                                            first->second.ToString()));
      return;
    }
    frame->key = node.text;
    frame->keep = true;
  }

  Place origin_;
  bool dotted_keys_;
  ConfigErrors* errors_;
  ConfigNode root_;
  std::vector<Frame> stack_;
  int64_t nodes_ = 0;
  int documents_ = 0;
};

bool CheckEncoding(const std::string& text, const Place& origin, ConfigErrors* errors) {
  Place place = origin;
  for (size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    const size_t length = Utf8Length(text, i);
    const bool control = (c < 0x20 && c != '\t' && c != '\n' && c != '\r') || c == 0x7F;
    if (length == 0 || control) {
      errors->Add(place, absl::StrFormat("byte 0x%02x is not text; a config is UTF-8", c));
      return false;
    }
    i += length;
    if (origin.line == 0) continue;
    ++place.column;
    if (c == '\n') {
      ++place.line;
      place.column = 1;
    }
  }
  return true;
}

}  // namespace

std::string Place::ToString() const {
  if (source == nullptr) return "config";
  if (line == 0) return absl::StrCat("word ", Quote(*source));
  if (line < 0) return *source;
  return absl::StrCat(*source, ":", line, ":", column);
}

std::string Quote(std::string_view text) {
  constexpr size_t kMaxShown = 60;
  std::string quoted = "\"";
  for (const char c : text.substr(0, kMaxShown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      quoted += "\\n";
    } else if (byte < 0x20 || byte == 0x7F) {
      quoted += absl::StrFormat("\\x%02x", byte);
    } else {
      quoted += c;
    }
  }
  // Do not end inside a UTF-8 sequence.
  if (text.size() > kMaxShown) {
    while (!quoted.empty() && (static_cast<unsigned char>(quoted.back()) & 0xC0U) == 0x80U) {
      quoted.pop_back();
    }
    if (static_cast<unsigned char>(quoted.back()) >= 0xC0U) quoted.pop_back();
    quoted += "...";
  }
  return quoted + "\"";
}

void ConfigErrors::Add(const Place& place, const std::string& message) {
  if (errors_.size() >= kMaxErrors) {
    ++dropped_;
    return;
  }
  errors_.push_back({place, message});
}

void ConfigErrors::Note(const Place& place, const std::string& message) {
  notes_.push_back(absl::StrCat(place.ToString(), ": ", message));
}

absl::Status ConfigErrors::ToStatus() const {
  if (errors_.empty()) return absl::OkStatus();
  std::vector<const Item*> sorted;
  for (const Item& item : errors_) sorted.push_back(&item);
  std::stable_sort(sorted.begin(), sorted.end(), [](const Item* a, const Item* b) {
    return std::tie(a->place.layer, a->place.line, a->place.column) <
           std::tie(b->place.layer, b->place.line, b->place.column);
  });
  std::string text;
  for (const Item* item : sorted) {
    if (!text.empty()) text += '\n';
    absl::StrAppend(&text, item->place.ToString(), ": ", item->message);
  }
  if (dropped_ > 0) absl::StrAppend(&text, "\nand ", dropped_, " more errors");
  return Error(ExitCode::kConfig, text);
}

const ConfigNode* ConfigNode::Find(std::string_view name) const {
  if (!is_map()) return nullptr;
  for (const ConfigNode& child : children) {
    if (child.key == name) return &child;
  }
  return nullptr;
}

ConfigNode* ConfigNode::Find(std::string_view name) {
  return const_cast<ConfigNode*>(std::as_const(*this).Find(name));
}

bool ConfigNode::Erase(std::string_view name) {
  if (!is_map()) return false;
  return std::erase_if(children, [name](const ConfigNode& c) { return c.key == name; }) > 0;
}

const ConfigNode* FindNode(const ConfigNode& root, std::string_view path) {
  const ConfigNode* node = &root;
  for (size_t begin = 0; node != nullptr && begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    node = node->Find(path.substr(begin, end - begin));
    begin = end + 1;
  }
  return node;
}

std::string Describe(const ConfigNode& node) {
  switch (node.kind) {
    case ConfigNode::Kind::kScalar:
      return Quote(node.text);
    case ConfigNode::Kind::kList:
      return "a list";
    case ConfigNode::Kind::kMap:
      return "a map";
    case ConfigNode::Kind::kNull:
    case ConfigNode::Kind::kBroken:
      break;
  }
  return "no value";
}

// Whether a tab is in the white space that line `line`, from 0, begins with.
bool TabIndents(const std::string& text, int line) {
  size_t begin = 0;
  for (; line > 0 && begin != std::string::npos; --line) {
    begin = text.find('\n', begin);
    if (begin != std::string::npos) ++begin;
  }
  if (begin == std::string::npos) return false;
  const size_t end = text.find_first_not_of(" \t", begin);
  return text.find('\t', begin) < std::min(end, text.size());
}

bool ParseYaml(const std::string& text, const Place& origin, bool any_root, ConfigNode* root,
               ConfigErrors* errors, bool dotted_keys) {
  if (!CheckEncoding(text, origin, errors)) return false;
  TreeBuilder builder(origin, dotted_keys, errors);
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    // The second call sees whether there is a second document.
    if (parser.HandleNextDocument(builder)) parser.HandleNextDocument(builder);
  } catch (const StopParsing&) {
    return false;
  } catch (const YAML::Exception& e) {
    errors->Add(
        At(origin, e.mark),
        absl::StrCat("not valid YAML: ", TabIndents(text, e.mark.line)
                                             ? "a tab in front of the line; YAML takes spaces only"
                                             : e.msg));
    return false;
  } catch (const std::exception& e) {
    errors->Add(origin, absl::StrCat("not valid YAML: ", e.what()));
    return false;
  }
  *root = builder.TakeRoot();
  if (any_root || root->is_map()) return true;
  if (root->kind != ConfigNode::Kind::kNull) {
    errors->Add(
        root->place,
        absl::StrCat("a config is a map of sections such as \"model:\", found ", Describe(*root)));
    return false;
  }
  root->kind = ConfigNode::Kind::kMap;
  return true;
}

}  // namespace krait
