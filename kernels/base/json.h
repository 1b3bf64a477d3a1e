// JSON from files that others may have written or damaged: strict and bounded.
#ifndef KRAIT_KERNELS_BASE_JSON_H_
#define KRAIT_KERNELS_BASE_JSON_H_

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "kernels/base/status.h"

namespace krait {

// Parses RFC 8259 JSON. Refused: duplicate keys (the usual parsers keep one of them silently),
// nesting above `max_depth`, more than 2^24 values, numbers outside f64. The error, with `code`,
// is "PLACE: what is wrong", with the byte offset for syntax errors. `text` may be up to 100 MB.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, const std::string& place,
                                         ExitCode code, int max_depth = 32);

// What Python's json module reads and writes: RFC 8259 and the numbers NaN, Infinity, -Infinity.
// Likewise checked; the dump takes numbers that are not finite.
absl::StatusOr<nlohmann::json> ParsePythonJson(std::string_view text, const std::string& place,
                                               ExitCode code);
std::string DumpPythonJson(const nlohmann::ordered_json& json, int indent = -1);
// What Python's json module writes, as RFC 8259: a zero in the place of each NaN and Infinity, and
// all other bytes where they were.
std::string WithoutNonFinite(std::string_view text);

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_JSON_H_
