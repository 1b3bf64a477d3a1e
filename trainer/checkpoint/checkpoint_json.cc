#include "trainer/checkpoint/checkpoint_json.h"

#include <cmath>

#include "absl/strings/str_format.h"
#include "kernels/base/crc32c.h"
#include "trainer/checkpoint/checkpoint_manifest.h"

namespace krait {
namespace {

using nlohmann::json;

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;
constexpr size_t kMaxRank = 4;  // of Tensor
constexpr size_t kMaxName = 512;
constexpr char kLetters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";

// The end of a text whose bytes before it have this CRC.
std::string Tail(uint32_t crc) { return absl::StrFormat("\"crc32c\":\"%08x\"}\n", crc); }

}  // namespace

void Seal(std::string* text) { *text += Tail(Crc32c(text->data(), text->size())); }

absl::StatusOr<json> Unseal(std::string_view text, const std::string& what) {
  const size_t tail = Tail(0).size();
  if (text.size() < tail) {
    return Error(kCode, what + " has " + std::to_string(text.size()) + " bytes: cut off or empty");
  }
  const std::string_view body = text.substr(0, text.size() - tail);
  if (text.substr(body.size()) != Tail(Crc32c(body.data(), body.size()))) {
    return Error(kCode, what + " does not match its own CRC32C: damaged or cut off");
  }
  return ParseJson(text, what, kCode, 6);
}

Members::Members(const json& object, std::string place)
    : object_(object), place_(std::move(place)) {
  if (!object_.is_object()) Wrong("is not an object");
}

const json* Members::Find(const char* key) {
  if (!problem_.empty()) return nullptr;
  const auto found = object_.find(key);
  if (found == object_.end()) {
    Wrong(std::string("'") + key + "' is missing");
    return nullptr;
  }
  return &*found;
}

int64_t Members::Count(const char* key, int64_t limit) {
  const json* value = Find(key);
  if (value == nullptr) return 0;
  if (!value->is_number_unsigned() || value->get<uint64_t>() > static_cast<uint64_t>(limit)) {
    Wrong(std::string("'") + key + "' is not a count up to " + std::to_string(limit));
    return 0;
  }
  return static_cast<int64_t>(value->get<uint64_t>());
}

double Members::NotNegative(const char* key) {
  const json* value = Find(key);
  if (value == nullptr) return 0;
  if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() < 0) {
    Wrong(std::string("'") + key + "' is not a number of at least 0");
    return 0;
  }
  return value->get<double>();
}

const json* Members::List(const char* key) {
  const json* value = Find(key);
  if (value == nullptr || value->is_array()) return value;
  Wrong(std::string("'") + key + "' is not a list");
  return nullptr;
}

std::string Members::Text(const char* key) {
  const json* value = Find(key);
  if (value == nullptr) return "";
  if (!value->is_string()) {
    Wrong(std::string("'") + key + "' is not a text");
    return "";
  }
  return value->get<std::string>();
}

std::string Members::Identifier(const char* key) {
  std::string text = Text(key);
  if (problem_.empty() && (text.empty() || text.size() > kMaxName || text[0] == '.' ||
                           text.find_first_not_of(kLetters) != std::string::npos)) {
    Wrong(std::string("'") + key + "' is not a name of letters, digits, '.', '_', '-'");
    return "";
  }
  return text;
}

std::string Members::SaveId(const char* key) {
  std::string text = Text(key);
  if (!IsSaveId(text)) Wrong(std::string("'") + key + "' is not 32 hexadecimal digits");
  return text;
}

std::vector<int64_t> Members::Counts(const char* key) {
  std::vector<int64_t> out;
  const json* value = Find(key);
  if (value == nullptr) return out;
  bool good = value->is_array() && value->size() <= kMaxRank;
  for (size_t i = 0; good && i < value->size(); ++i) {
    const json& item = (*value)[i];
    good = item.is_number_unsigned() && item.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
    if (good) out.push_back(static_cast<int64_t>(item.get<uint64_t>()));
  }
  if (!good) Wrong(std::string("'") + key + "' is not a list of up to 4 counts");
  return out;
}

absl::Status Members::Done() const {
  return problem_.empty() ? absl::OkStatus() : Error(kCode, problem_);
}

}  // namespace krait
