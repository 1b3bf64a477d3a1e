#include "data/json_texts.h"

#include <istream>
#include <streambuf>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/json.h"
#include "nlohmann/json.hpp"

namespace krait {
namespace {

using TakeText = std::function<absl::Status(const std::string& text)>;

// Picks the strings "text" out of records as they are parsed: of one object, or with `lists` of the
// objects of a list too.
class RecordTexts : public nlohmann::json_sax<nlohmann::json> {
 public:
  RecordTexts(bool lists, const TakeText& take) : lists_(lists), take_(take) {}

  bool null() override { return Scalar(); }
  bool boolean(bool) override { return Scalar(); }
  bool number_integer(number_integer_t) override { return Scalar(); }
  bool number_unsigned(number_unsigned_t) override { return Scalar(); }
  bool number_float(number_float_t, const string_t&) override { return Scalar(); }
  bool binary(binary_t&) override { return Scalar(); }
  bool string(string_t& value) override {
    if (!at_text_) return Scalar();
    text_ = std::move(value);
    has_text_ = true;
    at_text_ = false;
    return true;
  }
  bool key(string_t& value) override {
    at_text_ = depth_ == record_depth_ + 1 && value == "text";
    has_key_ = has_key_ || at_text_;
    return true;
  }
  bool start_object(size_t) override {
    if (depth_ == record_depth_) {
      has_key_ = has_text_ = at_text_ = false;
      text_.clear();
    }
    return Open();
  }
  bool end_object() override {
    --depth_;
    return depth_ > record_depth_ || EndRecord();
  }
  bool start_array(size_t) override {
    if (lists_ && depth_ == 0) {
      record_depth_ = 1;
    } else if (depth_ == record_depth_) {
      return Fail("an object with a string \"text\" is needed");
    }
    return Open();
  }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    fault_at = position;
    return Fail(absl::StrFormat("not JSON: %s", error.what()));
  }

  std::string fault;
  size_t fault_at = 0;  // of what is not JSON: its byte, from 1
  absl::Status taken;   // what `take` returned

 private:
  bool Fail(std::string why) {
    fault = std::move(why);
    return false;
  }
  // A value that is no record and no text.
  bool Scalar() {
    if (depth_ == record_depth_) return Fail("an object with a string \"text\" is needed");
    if (at_text_) has_text_ = false;
    at_text_ = false;
    return true;
  }
  bool Open() {
    if (at_text_) has_text_ = false;
    at_text_ = false;
    ++depth_;
    return true;
  }
  bool EndRecord() {
    if (!has_key_) return Fail("the field \"text\" is missing");
    if (!has_text_) return Fail("the field \"text\" is not a string");
    taken = take_(text_);
    return taken.ok();
  }

  bool lists_;
  const TakeText& take_;
  int64_t depth_ = 0;
  int64_t record_depth_ = 0;                 // where a record begins: 1 in a list
  bool at_text_ = false;                     // the value that comes next is the one
  bool has_key_ = false, has_text_ = false;  // the key exists; its value is a string
  std::string text_;
};

// A ByteSource for the JSON parser. Ends at its first error, which is kept.
class SourceBuffer : public std::streambuf {
 public:
  explicit SourceBuffer(ByteSource* source) : source_(source), buffer_(size_t{256} << 10) {}
  const absl::Status& status() const { return status_; }
  int64_t position() const { return begin_ + (gptr() - eback()); }  // of the next byte

 protected:
  int_type underflow() override {
    begin_ += egptr() - eback();
    setg(buffer_.data(), buffer_.data(), buffer_.data());
    if (!status_.ok()) return traits_type::eof();
    const auto got = source_->Read(buffer_.data(), static_cast<int64_t>(buffer_.size()));
    status_ = got.status();
    if (!got.ok() || *got == 0) return traits_type::eof();
    setg(buffer_.data(), buffer_.data(), buffer_.data() + *got);
    return traits_type::to_int_type(buffer_.front());
  }

 private:
  ByteSource* source_;
  std::vector<char> buffer_;
  int64_t begin_ = 0;  // of the file, at eback()
  absl::Status status_;
};

}  // namespace

absl::StatusOr<std::string> TextOfLine(const std::string& line, const std::string& place) {
  std::string text;
  const TakeText take = [&text](const std::string& found) {
    text = found;
    return absl::OkStatus();
  };
  RecordTexts texts(/*lists=*/false, take);
  if (nlohmann::json::sax_parse(line, &texts)) return text;
  // Python writes NaN and Infinity, which are no JSON, for numbers beside the text.
  if (texts.fault_at > 0) {
    const std::string finite = WithoutNonFinite(line);
    RecordTexts again(/*lists=*/false, take);
    if (finite != line && nlohmann::json::sax_parse(finite, &again)) return text;
    if (finite != line && again.fault_at == 0) {
      texts.fault = again.fault;
      texts.fault_at = 0;
    }
  }
  const std::string at =
      texts.fault_at > 0 ? absl::StrFormat(" at byte %u of the line", texts.fault_at) : "";
  return Error(ExitCode::kData, place + ": " + texts.fault + at);
}

absl::Status ReadJsonTexts(ByteSource* source, const std::string& path, const TakeText& take,
                           const std::function<absl::Status(int64_t bytes_read)>& progress) {
  SourceBuffer buffer(source);
  std::istream stream(&buffer);
  const TakeText take_and_tell = [&](const std::string& text) -> absl::Status {
    KRAIT_RETURN_IF_ERROR(take(text));
    return progress(buffer.position());
  };
  while (true) {
    stream >> std::ws;
    KRAIT_RETURN_IF_ERROR(buffer.status());
    if (stream.eof()) return absl::OkStatus();
    const int64_t begin = buffer.position();
    RecordTexts texts(/*lists=*/true, take_and_tell);
    const bool parsed =
        nlohmann::json::sax_parse(stream, &texts, nlohmann::json::input_format_t::json,
                                  /*strict=*/false);
    KRAIT_RETURN_IF_ERROR(buffer.status());
    KRAIT_RETURN_IF_ERROR(texts.taken);
    if (parsed) continue;
    const int64_t at =
        texts.fault_at > 0 ? begin + static_cast<int64_t>(texts.fault_at) : buffer.position();
    return Error(ExitCode::kData, absl::StrFormat("%s at byte %d: %s", path, at, texts.fault));
  }
}

}  // namespace krait
