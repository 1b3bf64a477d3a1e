#include "kernels/base/json.h"

#include <cstdint>
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

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, const std::string& place,
                                         ExitCode code, int max_depth) {
  Checker checker(max_depth);
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &checker)) {
    return Error(code, place + ": " + checker.problem());
  }
  return nlohmann::json::parse(text.begin(), text.end());
}

}  // namespace krait
