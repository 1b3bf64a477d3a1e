// The texts of JSON records: objects with a string "text".
#ifndef KRAIT_DATA_JSON_TEXTS_H_
#define KRAIT_DATA_JSON_TEXTS_H_

#include <functional>
#include <string>

#include "data/line_reader.h"
#include "kernels/base/status.h"

namespace krait {

// The string "text" of one line of a .jsonl file. kData; `place` ("path:line") begins the message.
absl::StatusOr<std::string> TextOfLine(const std::string& line, const std::string& place);

// Calls `take` with the text of each record of a .json file, in order: of a list of objects, or of
// objects one after another. `bytes_read` tells, between two records, how much was read. No value,
// however deeply nested, takes more memory than its own length. kData with path and byte.
absl::Status ReadJsonTexts(ByteSource* source, const std::string& path,
                           const std::function<absl::Status(const std::string& text)>& take,
                           const std::function<absl::Status(int64_t bytes_read)>& progress);

}  // namespace krait

#endif  // KRAIT_DATA_JSON_TEXTS_H_
