// safetensors files: u64 little-endian header length, JSON header, raw data
// (https://github.com/huggingface/safetensors). One file, or a folder with
// model.safetensors or model.safetensors.index.json and its shards.
#ifndef KRAIT_KERNELS_BASE_SAFETENSORS_H_
#define KRAIT_KERNELS_BASE_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/file.h"
#include "kernels/base/status.h"

namespace krait {

struct SafetensorsEntry {
  std::string file;            // path
  std::string stored;          // the dtype as the file names it: "F32", "F16", "F8_E4M3"
  std::optional<DType> dtype;  // nullopt: Krait has no tensors of it
  std::vector<int64_t> shape;
  int64_t begin = 0;  // byte offset in the file
  int64_t bytes = 0;
  int64_t numel() const;
  bool IsFloat() const;  // ReadF32 takes it
};

// Checked as the format demands: header at most 100 MB, offsets inside the file, no overlap, no
// holes, no overflow, no duplicate names. Errors (kNoCheckpoint) name path and byte offset.
// Thread-safe once opened; files are opened anew for each read.
class SafetensorsReader {
 public:
  static absl::StatusOr<SafetensorsReader> OpenFile(const std::string& path);
  // In a folder with shards the index decides: tensors that it does not list are left out.
  static absl::StatusOr<SafetensorsReader> OpenFolder(const std::string& folder);
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  // The "__metadata__" texts of the header, or of the headers of all shards: of one that differs
  // the first shard's.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // The file or folder opened, for messages.
  const std::string& path() const { return path_; }
  // Elements [begin, begin+count) of a tensor, converted to f32 (from f32, bf16, f16 exactly, from
  // f64 rounded to nearest; a number beyond f32 is an error) or to i32 (from i32, i64, u8; out of
  // range is an error).
  absl::Status ReadF32(const std::string& name, int64_t begin, int64_t count, float* out) const;
  absl::Status ReadI32(const std::string& name, int64_t begin, int64_t count, int32_t* out) const;
  // The same elements as they are stored; not of a dtype with less than a byte.
  absl::Status ReadRaw(const std::string& name, int64_t begin, int64_t count, void* out) const;

 private:
  std::string path_;
  std::map<std::string, SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

// Writes tensors in the order given; data is streamed, so a tensor may be freed after Write.
// Errors are kCannotSave. Without Finish() nothing appears under `path`, and what there was stays.
class SafetensorsWriter {
 public:
  SafetensorsWriter(SafetensorsWriter&&) = default;
  SafetensorsWriter& operator=(SafetensorsWriter&&) = delete;
  ~SafetensorsWriter();  // removes the temporary file when Finish() was not reached

  struct Item {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
  };
  // Writes the header to a temporary name beside `path`; Finish() fsyncs and renames.
  static absl::StatusOr<SafetensorsWriter> Create(
      const std::string& path, const std::vector<Item>& items,
      const std::map<std::string, std::string>& metadata);
  // The next item's data in the item's dtype: all of it, or the next piece.
  absl::Status Write(const void* data, int64_t bytes);
  absl::Status Finish();

 private:
  SafetensorsWriter() = default;

  File file_;  // open until finished
  std::string final_path_;
  std::vector<int64_t> ends_;  // of the items, in the file
  size_t next_ = 0;            // the item being written
  int64_t offset_ = 0;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_SAFETENSORS_H_
