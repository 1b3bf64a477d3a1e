// POSIX files with every return code checked, and the atomic publish of a small file.
//
// Each function returns a status with the path, the operation and the system's reason; `code` is
// the exit code the failure leads to (kData for token files, kCannotSave for writes, ...).
#ifndef KRAIT_KERNELS_BASE_FILE_H_
#define KRAIT_KERNELS_BASE_FILE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

// An open file descriptor, closed on destruction. Writers call Close() to see its error.
class File {
 public:
  File() = default;
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  static absl::StatusOr<File> OpenRead(const std::string& path, ExitCode code);
  // Creates (O_EXCL when `exclusive`, else truncating) for reading and writing, mode 0644.
  static absl::StatusOr<File> Create(const std::string& path, bool exclusive, ExitCode code);
  // Opens an existing file for reading and writing.
  static absl::StatusOr<File> OpenWrite(const std::string& path, ExitCode code);

  // Reads or writes exactly `size` bytes at `offset`; retries short transfers and EINTR.
  absl::Status ReadAt(void* data, size_t size, int64_t offset) const;
  absl::Status WriteAt(const void* data, size_t size, int64_t offset) const;
  absl::StatusOr<int64_t> Size() const;
  // fsync, never retried: a failed fsync means that the data may be lost.
  absl::Status Sync() const;
  absl::Status Close();

  int fd() const { return fd_; }
  const std::string& path() const { return path_; }

 private:
  int fd_ = -1;
  std::string path_;
  ExitCode code_ = ExitCode::kInternal;
};

// The whole file; refuses directories, and files above `max_bytes`.
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes, ExitCode code);

// Writes a temporary file beside `path`, fsyncs it, renames it to `path` and fsyncs the folder:
// readers see the old content or the new, never a part, also after a power cut.
absl::Status WriteFileAtomic(const std::string& path, std::string_view content, ExitCode code);

absl::Status SyncDirectory(const std::string& path, ExitCode code);
absl::Status Rename(const std::string& from, const std::string& to, ExitCode code);
// mkdir -p.
absl::Status MakeDirectories(const std::string& path, ExitCode code);
// Removes a file or a symbolic link; a missing path is fine, a folder an error.
absl::Status RemoveFile(const std::string& path, ExitCode code);
// rm -r; a missing path is fine. Never follows symbolic links.
absl::Status RemoveAll(const std::string& path, ExitCode code);
// Names (not paths) in a folder, sorted; without "." and "..".
absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path, ExitCode code);
// The folder that holds `path`: "." for a plain name.
std::string ParentFolder(const std::string& path);
// Anything of that name, dangling symbolic links too.
bool Exists(const std::string& path);
bool IsDirectory(const std::string& path);

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_FILE_H_
