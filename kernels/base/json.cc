#include "kernels/base/json.h"

#include <cctype>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

namespace krait {
namespace {

constexpr int64_t kMaxValues = int64_t{1} << 24;

// Keys are shown in messages: no control characters, not endless.
std::string Shown(const std::string& text) {
  std::string out = text.substr(0, 80);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20) c = '?';
  }
  return out;
}

// Walks the text without building anything, so that hostile input costs no memory.
class Checker : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Checker(int max_depth) : max_depth_(max_depth) {}
  const std::string& problem() const { return problem_; }

  bool null() override { return Value(); }
  bool boolean(bool) override { return Value(); }
  bool number_integer(number_integer_t) override { return Value(); }
  bool number_unsigned(number_unsigned_t) override { return Value(); }
  bool number_float(number_float_t, const string_t&) override { return Value(); }
  bool string(string_t&) override { return Value(); }
  bool binary(binary_t&) override { return Value(); }
  bool start_object(std::size_t) override { return Open(); }
  bool start_array(std::size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    problem_ = "the key '" + Shown(name) + "' appears twice";
    return false;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    // The text after the library's own prefix "[json.exception...] parse error at ...: ".
    const std::string what = error.what();
    const size_t colon = what.find(": ");
    problem_ = "not JSON at byte " + std::to_string(position) + ": " +
               Shown(colon == std::string::npos ? what : what.substr(colon + 2));
    return false;
  }

 private:
  bool Value() {
    if (++values_ <= kMaxValues) return true;
    problem_ = "more than " + std::to_string(kMaxValues) + " JSON values";
    return false;
  }
  bool Open() {
    keys_.emplace_back();
    if (static_cast<int>(keys_.size()) <= max_depth_) return Value();
    problem_ = "JSON nested deeper than " + std::to_string(max_depth_) + " levels";
    return false;
  }
  bool Close() {
    keys_.pop_back();
    return true;
  }

  int max_depth_;
  int64_t values_ = 0;
  std::vector<std::set<std::string>> keys_;  // of the objects (and arrays: empty) being open
  std::string problem_;
};

// Strings that stand for the numbers that JSON has no text for, quotes included: of the same
// length, so that byte offsets stay, and with a character that no key or text of a config has.
struct NonFinite {
  std::string_view text, marker;
  double value;
  std::string_view zero;  // a number of JSON in its place
};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr NonFinite kNonFinite[] = {
    {"NaN", "\"\x7f\"", std::numeric_limits<double>::quiet_NaN(), "0  "},
    {"Infinity", "\"\x7f+++++\"", kInfinity, "0       "},
    {"-Infinity", "\"\x7f------\"", -kInfinity, "0        "},
};

// The text with markers, or zeros, in place of the numbers; `found` tells whether there are any.
std::string Replaced(std::string_view text, std::string_view NonFinite::*with, bool* found) {
  std::string out(text);
  const auto word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
  bool in_string = false;
  for (size_t i = 0; i < out.size(); ++i) {
    if (in_string && out[i] == '\\')
      ++i;
    else if (out[i] == '"')
      in_string = !in_string;
    else if (!in_string && (i == 0 || !word(out[i - 1]))) {
      for (const NonFinite& number : kNonFinite) {
        const size_t end = i + number.text.size();
        if (text.substr(i, number.text.size()) != number.text) continue;
        if (end < out.size() && word(out[end])) continue;
        out.replace(i, number.text.size(), number.*with);
        i = end - 1;
        *found = true;
        break;
      }
    }
  }
  return out;
}

template <typename Json, typename Change>
void ChangeValues(Json* json, const Change& change) {
  if (json->is_structured()) {
    for (auto& value : *json) ChangeValues(&value, change);
  } else {
    change(json);
  }
}

std::string_view Unquoted(std::string_view marker) { return marker.substr(1, marker.size() - 2); }

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, const std::string& place,
                                         ExitCode code, int max_depth) {
  Checker checker(max_depth);
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &checker)) {
    return Error(code, place + ": " + checker.problem());
  }
  return nlohmann::json::parse(text.begin(), text.end());
}

absl::StatusOr<nlohmann::json> ParsePythonJson(std::string_view text, const std::string& place,
                                               ExitCode code) {
  bool found = false;
  const std::string marked = Replaced(text, &NonFinite::marker, &found);
  KRAIT_ASSIGN_OR_RETURN(nlohmann::json json, ParseJson(marked, place, code));
  if (!found) return json;
  ChangeValues(&json, [](nlohmann::json* value) {
    if (!value->is_string()) return;
    for (const NonFinite& number : kNonFinite) {
      if (value->get_ref<const std::string&>() == Unquoted(number.marker)) {
        *value = number.value;
        return;
      }
    }
  });
  return json;
}

std::string WithoutNonFinite(std::string_view text) {
  bool found = false;
  return Replaced(text, &NonFinite::zero, &found);
}

std::string DumpPythonJson(const nlohmann::ordered_json& json, int indent) {
  nlohmann::ordered_json marked = json;
  bool found = false;
  ChangeValues(&marked, [&](nlohmann::ordered_json* value) {
    if (!value->is_number_float() || std::isfinite(value->get<double>())) return;
    const double number = value->get<double>();
    found = true;
    for (const NonFinite& known : kNonFinite) {
      if (number == known.value || (std::isnan(number) && std::isnan(known.value))) {
        *value = std::string(Unquoted(known.marker));
        return;
      }
    }
  });
  std::string text = marked.dump(indent);
  for (const NonFinite& number : kNonFinite) {
    for (size_t at = 0; found && (at = text.find(number.marker, at)) != std::string::npos;) {
      text.replace(at, number.marker.size(), number.text);
    }
  }
  return text;
}

}  // namespace krait
