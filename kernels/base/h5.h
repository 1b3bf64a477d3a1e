// The one user of HDF5. Two kinds of content: token files (chunked, grown by appending) and
// checkpoint shards (contiguous datasets whose bytes the caller writes itself with pwrite).
//
// Files are created in the V110 format (checksummed metadata, "was not closed" mark). Every return
// code is checked, closes too: on a full disk HDF5 may report the error only there. Calls are not
// safe from several threads at once; the functions take one process-wide mutex.
// HDF5 never fsyncs: durability is the caller's (File::Sync).
#ifndef KRAIT_KERNELS_BASE_H5_H_
#define KRAIT_KERNELS_BASE_H5_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace krait {

class H5File {
 public:
  H5File() = default;
  H5File(H5File&& other) noexcept;
  H5File& operator=(H5File&& other) noexcept;
  ~H5File();  // closes and ignores errors: call Close() after writing

  // `code` is the exit code of every error of this file.
  static absl::StatusOr<H5File> Create(const std::string& path, ExitCode code);
  static absl::StatusOr<H5File> OpenRead(const std::string& path, ExitCode code);
  absl::Status Close();

  // Attributes of the root group.
  absl::Status WriteAttribute(std::string_view name, std::string_view value);
  absl::Status WriteAttribute(std::string_view name, uint64_t value);
  absl::StatusOr<std::string> ReadStringAttribute(std::string_view name) const;
  absl::StatusOr<uint64_t> ReadIntAttribute(std::string_view name) const;

  // A growing one-dimensional dataset of u8, u16, u32 or u64 elements (dtype kU8 ... kU64).
  absl::Status CreateChunked(std::string_view name, DType dtype, int64_t chunk_elements);
  absl::Status Append(std::string_view name, const void* data, int64_t elements);

  // A dataset for the caller's own bytes: contiguous, allocated at once, not filled, its data
  // aligned to 4096 bytes. Creates missing groups of `name` ("/weight/model.x/0"). Returns the byte
  // offset of its data in the file. bf16 is stored as a 2-byte IEEE-like float type.
  absl::StatusOr<int64_t> CreateContiguous(std::string_view name, DType dtype,
                                           const std::vector<int64_t>& shape);

  // Element count and dtype of a one-dimensional dataset; refuses external, virtual and filtered
  // storage other than deflate, soft and external links, and sizes beyond the file's own.
  struct Info {
    DType dtype;
    int64_t elements;
  };
  absl::StatusOr<Info> Stat(std::string_view name) const;
  // Reads elements [begin, begin + count) of a one-dimensional dataset in its own dtype.
  absl::Status Read(std::string_view name, int64_t begin, int64_t count, void* out) const;

  const std::string& path() const { return path_; }

 private:
  int64_t id_ = -1;
  std::string path_;
  ExitCode code_ = ExitCode::kInternal;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_H5_H_
