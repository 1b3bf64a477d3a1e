// The records of texts, .jsonl and .json files, in order, for `data build` (token_file.h).
#ifndef KRAIT_DATA_RECORDS_H_
#define KRAIT_DATA_RECORDS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/inputs.h"
#include "data/line_reader.h"

namespace krait {

enum class RecordKind : uint8_t {
  kText,      // a text file, or a piece of one
  kLine,      // a line of a .jsonl file, still to be parsed
  kJsonText,  // the text of a record of a .json file
};

struct Record {
  std::string content;
  RecordKind kind = RecordKind::kText;
  int64_t number = 0;  // in the input, from 1; of a .jsonl file the line
  bool ends_document = true;
};

// What an input turned out to be.
enum class InputKind : uint8_t {
  kRecords,    // .jsonl, .json
  kText,       // one document
  kPlainJson,  // a .json file without records, taken as a text
  kNoText      // of a folder: empty, or holds NUL
};

class RecordReader {
 public:
  // Takes a record; an error ends the reading.
  using Take = std::function<absl::Status(Record record)>;
  // Told between two records how many bytes of the file have been read.
  using Tell = std::function<absl::Status(int64_t bytes)>;

  // `pieces`: texts are handed over in pieces. Texts above 1 GiB are refused otherwise.
  RecordReader(const Input& input, bool pieces, const Take& take, const Tell& tell)
      : input_(input), pieces_(pieces), take_(take), tell_(tell) {}

  // Reads the input, without its first `skip` records (blank lines count).
  absl::StatusOr<InputKind> Read(int64_t skip);

 private:
  absl::StatusOr<InputKind> ReadText();
  absl::Status ReadLines();
  absl::StatusOr<InputKind> ReadJson();
  absl::StatusOr<InputKind> NotText(const std::string& why) const;
  absl::Status Hand(Record record);

  const Input& input_;
  bool pieces_;
  const Take& take_;
  const Tell& tell_;
  int64_t skip_ = 0, number_ = 0;
};

}  // namespace krait

#endif  // KRAIT_DATA_RECORDS_H_
