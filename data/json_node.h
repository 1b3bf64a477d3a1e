// A value of a JSON file with its place in it, for messages.
#ifndef KRAIT_DATA_JSON_NODE_H_
#define KRAIT_DATA_JSON_NODE_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "absl/strings/str_format.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace krait {

// Lives no longer than the parsed file. Errors are kData for what has another type than it should,
// kConfig for what is not supported; they begin with the place ("tokenizer.json: model.merges[3]").
struct JsonNode {
  const nlohmann::json* value;
  std::string place;

  bool IsNull() const { return value->is_null(); }
  // A member; null where there is none.
  JsonNode operator[](const char* key) const {
    static const nlohmann::json null;
    const auto found = value->is_object() ? value->find(key) : value->end();
    const bool there = value->is_object() && found != value->end();
    const char* separator = place.ends_with(':') ? " " : ".";
    return {there ? &*found : &null, place + separator + key};
  }
  JsonNode At(size_t index) const {
    return {&(*value)[index], absl::StrFormat("%s[%d]", place, index)};
  }

  absl::Status Wrong(const char* needed) const {
    return Error(ExitCode::kData,
                 absl::StrFormat("%s is %s; %s is needed", place,
                                 value->is_null() ? "missing" : value->type_name(), needed));
  }
  absl::Status Unsupported(const std::string& what) const {
    return Error(ExitCode::kConfig,
                 absl::StrFormat("%s: %s is not supported", place, what.substr(0, 100)));
  }
  absl::Status CheckObject() const {
    return value->is_object() ? absl::OkStatus() : Wrong("an object");
  }
  absl::Status CheckArray() const { return value->is_array() ? absl::OkStatus() : Wrong("a list"); }
  // Of an object.
  absl::Status CheckKeys(std::initializer_list<std::string_view> known) const {
    KRAIT_RETURN_IF_ERROR(CheckObject());
    for (const auto& [key, member] : value->items()) {
      bool found = key == "type";
      for (const std::string_view name : known) found = found || key == name;
      if (!found) return Unsupported("the key \"" + key + "\"");
    }
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> String() const {
    if (!value->is_string()) return Wrong("a string");
    return value->get<std::string>();
  }
  absl::StatusOr<bool> Bool() const {
    if (!value->is_boolean()) return Wrong("true or false");
    return value->get<bool>();
  }
  absl::StatusOr<bool> Bool(bool otherwise) const {
    if (value->is_null()) return otherwise;
    return Bool();
  }
  // Within [0, 2^31).
  absl::StatusOr<int32_t> Id() const {
    if (!value->is_number_integer() || value->get<int64_t>() < 0 ||
        value->get<uint64_t>() > INT32_MAX) {
      return Wrong("an id from 0 to 2147483647");
    }
    return static_cast<int32_t>(value->get<int64_t>());
  }
};

}  // namespace krait

#endif  // KRAIT_DATA_JSON_NODE_H_
