// The one user of HDF5. Two kinds of content: token files (chunked, grown by appending) and
// checkpoint shards (contiguous datasets whose bytes the caller writes itself with pwrite).
//
// Files are created in the V110 format (checksummed metadata, "was not closed" mark). Every return
// code is checked, closes too: on a full disk HDF5 may report the error only there. After a failed
// write the file is given up for good: it is cut to 0 bytes, every later call returns an error, and
// HDF5 never touches it again (HDF5 1.10 dies of SIGSEGV when it flushes such a file at exit).
// HDF5 never fsyncs: durability is the caller's (File::Sync).
//
// One object must not be used from several threads at once; different objects may: every call
// takes one process-wide mutex. Messages carry the path and HDF5's own reason.
#ifndef KRAIT_KERNELS_BASE_H5_H_
#define KRAIT_KERNELS_BASE_H5_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace krait {

class H5File {
 public:
  H5File();
  H5File(H5File&& other) noexcept;
  H5File& operator=(H5File&& other) noexcept;
  ~H5File();  // closes and ignores errors: call Close() after writing

  // `code` is the exit code of every error of this file. Create refuses an existing path.
  static absl::StatusOr<H5File> Create(const std::string& path, ExitCode code);
  // OpenRead refuses the file formats before HDF5 1.10, whose metadata has no checksums.
  static absl::StatusOr<H5File> OpenRead(const std::string& path, ExitCode code);
  absl::Status Close();

  // Attributes of the root group: scalar fixed-length strings and integers >= 0.
  absl::Status WriteAttribute(std::string_view name, std::string_view value);
  absl::Status WriteAttribute(std::string_view name, uint64_t value);
  bool HasAttribute(std::string_view name) const;
  absl::StatusOr<std::string> ReadStringAttribute(std::string_view name) const;
  absl::StatusOr<uint64_t> ReadIntAttribute(std::string_view name) const;

  // A growing one-dimensional dataset. Each chunk carries a Fletcher32 checksum, so that a read of
  // a damaged chunk is an error.
  absl::Status CreateChunked(std::string_view name, DType dtype, int64_t chunk_elements);
  absl::Status Append(std::string_view name, const void* data, int64_t elements);

  // A dataset for the caller's own bytes: contiguous, allocated at once, not filled; data of 4096
  // bytes and more is aligned to 4096. Creates missing groups of `name` ("/weight/model.x/0").
  // Returns the byte offset of its data in the file; write there only after Close(), which brings
  // the file to its full size. `shape` has no 0; {} is a scalar. bf16 is stored as a 2-byte
  // IEEE-like float type.
  absl::StatusOr<int64_t> CreateContiguous(std::string_view name, DType dtype,
                                           const std::vector<int64_t>& shape);

  // Element count and dtype of a one-dimensional dataset. Refuses soft and external links,
  // external, virtual and compact storage, filters other than Fletcher32, unknown types, chunks
  // above 64 MiB, missing chunks, and sizes beyond the file's own: nothing is allocated before that
  // is known.
  struct Info {
    DType dtype;
    int64_t elements;
  };
  absl::StatusOr<Info> Stat(std::string_view name) const;
  // Reads elements [begin, begin + count) of a one-dimensional dataset in its own dtype.
  absl::Status Read(std::string_view name, int64_t begin, int64_t count, void* out) const;

  const std::string& path() const { return path_; }

 private:
  struct State;  // the HDF5 handles
  struct Dataset;
  struct Attribute;

  absl::StatusOr<Attribute> OpenAttribute(const std::string& name) const;
  absl::StatusOr<const Dataset*> Find(std::string_view name) const;
  absl::Status CheckWritable() const;
  // An error with the path, `what` and HDF5's reason; gives up a file that is being written.
  absl::Status Fail(const std::string& what) const;

  std::unique_ptr<State> state_;
  std::string path_;
  ExitCode code_ = ExitCode::kInternal;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_H5_H_
