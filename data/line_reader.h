// The lines of a plain, gzip (.gz) or Zstandard (.zst) file, as a stream: memory holds one line.
#ifndef KRAIT_DATA_LINE_READER_H_
#define KRAIT_DATA_LINE_READER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/base/status.h"

namespace krait {

// Bytes of a file after decompression.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  // Up to `size` > 0 bytes; 0 only at the end. A compressed file that ends early, carries other
  // data or has a wrong checksum is an error (kData) that names the byte in the compressed file.
  virtual absl::StatusOr<int64_t> Read(char* out, int64_t size) = 0;
  // Bytes of the file itself that were read so far.
  virtual int64_t bytes_read() const = 0;
};

// By the ending of `path`: .gz, .zst, or anything else for plain bytes.
absl::StatusOr<std::unique_ptr<ByteSource>> OpenByteSource(const std::string& path);

class LineReader {
 public:
  static constexpr int64_t kMaxLine = int64_t{1} << 30;  // bytes

  static absl::StatusOr<LineReader> Open(const std::string& path);

  // The next line without its newline; false at the end. The last line needs no newline.
  absl::StatusOr<bool> Next(std::string* line);

  int64_t line_number() const { return line_number_; }  // of the last line, from 1
  int64_t line_begin() const { return line_begin_; }    // its offset, after decompression
  int64_t bytes_read() const { return source_->bytes_read(); }

 private:
  std::string path_;
  std::unique_ptr<ByteSource> source_;
  std::string buffer_;  // bytes [used_, size) are not consumed yet
  size_t used_ = 0;
  bool at_end_ = false;
  int64_t line_number_ = 0, line_begin_ = 0, next_begin_ = 0;
};

}  // namespace krait

#endif  // KRAIT_DATA_LINE_READER_H_
