#include "data/line_reader.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "kernels/base/file.h"

namespace krait {
namespace {

constexpr int64_t kPiece = int64_t{256} << 10;

class PlainSource : public ByteSource {
 public:
  PlainSource(File file, int64_t size) : file_(std::move(file)), size_(size) {}

  absl::StatusOr<int64_t> Read(char* out, int64_t size) override {
    const int64_t count = std::min(size, size_ - position_);
    KRAIT_RETURN_IF_ERROR(file_.ReadAt(out, static_cast<size_t>(count), position_));
    position_ += count;
    return count;
  }
  int64_t bytes_read() const override { return position_; }
  const std::string& path() const { return file_.path(); }

 private:
  File file_;
  int64_t size_;
  int64_t position_ = 0;
};

// The compressed bytes that the two decompressors draw on.
class CompressedInput {
 public:
  explicit CompressedInput(PlainSource source) : source_(std::move(source)), buffer_(kPiece) {}

  // Fetches the next piece once the last is used up; then size() is 0 only at the end of the file.
  absl::Status Fill() {
    if (used_ < size_) return absl::OkStatus();
    used_ = 0;
    KRAIT_ASSIGN_OR_RETURN(size_, source_.Read(buffer_.data(), kPiece));
    return absl::OkStatus();
  }
  char* data() { return buffer_.data() + used_; }
  int64_t size() const { return size_ - used_; }
  void Use(int64_t bytes) { used_ += bytes; }
  int64_t bytes_read() const { return source_.bytes_read(); }

  absl::Status Fault(const std::string& what) const {
    return Error(ExitCode::kData, absl::StrFormat("%s at byte %d: %s", source_.path(),
                                                  source_.bytes_read() - size(), what));
  }

 private:
  PlainSource source_;
  std::vector<char> buffer_;
  int64_t used_ = 0, size_ = 0;
};

class GzipSource : public ByteSource {
 public:
  explicit GzipSource(PlainSource source) : input_(std::move(source)) {}
  ~GzipSource() override { inflateEnd(&stream_); }

  absl::Status Start() {
    constexpr int kGzipWithLargestWindow = 16 + MAX_WBITS;
    if (inflateInit2(&stream_, kGzipWithLargestWindow) != Z_OK) {
      return input_.Fault("cannot start the gzip decoder");
    }
    return absl::OkStatus();
  }

  int64_t bytes_read() const override { return input_.bytes_read(); }
  absl::StatusOr<int64_t> Read(char* out, int64_t size) override {
    while (true) {
      KRAIT_RETURN_IF_ERROR(input_.Fill());
      if (input_.size() == 0) {
        if (between_members_ && any_member_) return 0;
        return input_.Fault("the gzip file ends early");
      }
      if (between_members_) {
        inflateReset(&stream_);
        between_members_ = false;
      }
      const int64_t room = std::min(size, kPiece);
      stream_.next_in = reinterpret_cast<Bytef*>(input_.data());
      stream_.avail_in = static_cast<uInt>(input_.size());
      stream_.next_out = reinterpret_cast<Bytef*>(out);
      stream_.avail_out = static_cast<uInt>(room);
      const int code = inflate(&stream_, Z_NO_FLUSH);
      input_.Use(input_.size() - static_cast<int64_t>(stream_.avail_in));
      if (code == Z_STREAM_END) {
        between_members_ = any_member_ = true;
      } else if (code != Z_OK && code != Z_BUF_ERROR) {
        return input_.Fault(std::string("not a sound gzip file (") +
                            (stream_.msg != nullptr ? stream_.msg : "no reason given") + ")");
      }
      const int64_t produced = room - static_cast<int64_t>(stream_.avail_out);
      if (produced > 0) return produced;
    }
  }

 private:
  CompressedInput input_;
  z_stream stream_{};
  bool between_members_ = true, any_member_ = false;
};

class ZstdSource : public ByteSource {
 public:
  explicit ZstdSource(PlainSource source) : input_(std::move(source)) {}

  int64_t bytes_read() const override { return input_.bytes_read(); }
  absl::StatusOr<int64_t> Read(char* out, int64_t size) override {
    // Windows of up to 2 GiB, as the format allows and zstd --long writes; settled before a frame.
    if (!started_ && (context_ == nullptr || ZSTD_isError(ZSTD_DCtx_setParameter(
                                                 context_.get(), ZSTD_d_windowLogMax, 31)))) {
      return input_.Fault("cannot start the Zstandard decoder");
    }
    started_ = true;
    ZSTD_outBuffer output = {out, static_cast<size_t>(size), 0};
    while (true) {
      KRAIT_RETURN_IF_ERROR(input_.Fill());
      // Without input a call still empties what the decoder holds back.
      if (input_.size() == 0 && frame_done_) {
        if (any_frame_) return 0;
        return input_.Fault("the Zstandard file is empty");
      }
      ZSTD_inBuffer input = {input_.data(), static_cast<size_t>(input_.size()), 0};
      const size_t code = ZSTD_decompressStream(context_.get(), &output, &input);
      if (ZSTD_isError(code)) {
        return input_.Fault(std::string("not a sound Zstandard file (") + ZSTD_getErrorName(code) +
                            ")");
      }
      const bool at_end = input_.size() == 0;
      input_.Use(static_cast<int64_t>(input.pos));
      frame_done_ = code == 0;
      any_frame_ = true;
      if (output.pos > 0) return static_cast<int64_t>(output.pos);
      if (at_end && !frame_done_) return input_.Fault("the Zstandard file ends early");
    }
  }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };
  CompressedInput input_;
  std::unique_ptr<ZSTD_DCtx, Free> context_{ZSTD_createDCtx()};
  bool started_ = false;
  bool frame_done_ = true, any_frame_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ByteSource>> OpenByteSource(const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(File file, File::OpenRead(path, ExitCode::kData));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
  PlainSource plain(std::move(file), size);
  if (absl::EndsWithIgnoreCase(path, ".gz")) {
    auto source = std::make_unique<GzipSource>(std::move(plain));
    KRAIT_RETURN_IF_ERROR(source->Start());
    return std::unique_ptr<ByteSource>(std::move(source));
  }
  if (absl::EndsWithIgnoreCase(path, ".zst")) {
    return std::unique_ptr<ByteSource>(std::make_unique<ZstdSource>(std::move(plain)));
  }
  return std::unique_ptr<ByteSource>(std::make_unique<PlainSource>(std::move(plain)));
}

absl::StatusOr<LineReader> LineReader::Open(const std::string& path) {
  LineReader reader;
  reader.path_ = path;
  KRAIT_ASSIGN_OR_RETURN(reader.source_, OpenByteSource(path));
  return reader;
}

absl::StatusOr<bool> LineReader::Next(std::string* line) {
  line->clear();
  size_t newline = buffer_.find('\n', used_);
  while (newline == std::string::npos && !at_end_) {
    buffer_.erase(0, used_);
    used_ = 0;
    const size_t size = buffer_.size();
    if (static_cast<int64_t>(size) > kMaxLine) {
      return Error(ExitCode::kData, absl::StrFormat("%s:%d: the line is longer than 1 GiB", path_,
                                                    line_number_ + 1));
    }
    buffer_.resize(size + static_cast<size_t>(kPiece));
    KRAIT_ASSIGN_OR_RETURN(const int64_t got, source_->Read(buffer_.data() + size, kPiece));
    buffer_.resize(size + static_cast<size_t>(got));
    at_end_ = got == 0;
    newline = buffer_.find('\n', size);
  }
  const size_t end = newline == std::string::npos ? buffer_.size() : newline;
  if (newline == std::string::npos && end == used_) return false;
  line->assign(buffer_, used_, end - used_);
  ++line_number_;
  line_begin_ = next_begin_;
  next_begin_ += static_cast<int64_t>(end - used_) + 1;
  used_ = std::min(end + 1, buffer_.size());
  return true;
}

}  // namespace krait
