// Texts of a checkpoint: JSON whose last member is the CRC32C of all text before it, read as the
// work of a stranger.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_JSON_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_JSON_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/base/json.h"
#include "kernels/base/status.h"

namespace krait {

// `text` is an object without its end, a comma last: its end goes behind it.
void Seal(std::string* text);

// The object in `text`, of `what` ("DIR/manifest.json"). kNoCheckpoint where it does not match its
// own CRC32C or is no JSON.
absl::StatusOr<nlohmann::json> Unseal(std::string_view text, const std::string& what);

// "[\nA,\nB]", an item per line; texts that are not UTF-8 are replaced.
template <typename Items, typename ToJson>
std::string ListText(const Items& items, const ToJson& to_json) {
  std::string text = "[";
  const char* separator = "\n";
  for (const auto& item : items) {
    text +=
        separator + to_json(item).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    separator = ",\n";
  }
  return text + "]";
}

// Reads members of one JSON object; the first thing wrong is kept as a sentence about `place`.
class Members {
 public:
  Members(const nlohmann::json& object, std::string place);

  int64_t Count(const char* key, int64_t limit = INT64_MAX);
  uint32_t Crc(const char* key) { return static_cast<uint32_t>(Count(key, UINT32_MAX)); }
  double NotNegative(const char* key);
  // null, after saying so, when it is no list.
  const nlohmann::json* List(const char* key);
  std::string Text(const char* key);
  // Of the fixed alphabet, so that it is safe in paths and messages.
  std::string Identifier(const char* key);
  // 32 hexadecimal digits.
  std::string SaveId(const char* key);
  // As many as a tensor may have dimensions.
  std::vector<int64_t> Counts(const char* key);

  const nlohmann::json* Find(const char* key);
  bool Has(const char* key) const { return object_.is_object() && object_.contains(key); }
  void Wrong(const std::string& what) {
    if (problem_.empty()) problem_ = place_ + ": " + what;
  }
  bool good() const { return problem_.empty(); }
  absl::Status Done() const;

 private:
  const nlohmann::json& object_;
  std::string place_, problem_;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_JSON_H_
