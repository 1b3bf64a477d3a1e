#include "kernels/base/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

namespace krait {
namespace {

// "cannot write PATH: No space left on device".
absl::Status SystemError(ExitCode code, const char* operation, const std::string& path, int error) {
  return Error(code, std::string("cannot ") + operation + " " + path + ": " +
                         std::generic_category().message(error));
}

// Linux transfers at most 0x7ffff000 bytes per call; stay below that.
constexpr size_t kMaxTransfer = size_t{1} << 30;

}  // namespace

File::File(File&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)), code_(other.code_) {}

File& File::operator=(File&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    fd_ = std::exchange(other.fd_, -1);
    path_ = std::move(other.path_);
    code_ = other.code_;
  }
  return *this;
}

File::~File() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<File> File::OpenRead(const std::string& path, ExitCode code) {
  // O_NONBLOCK: opening a FIFO nobody writes to would hang; it has no effect on regular files.
  File file;
  file.fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.fd_ < 0) return SystemError(code, "open", path, errno);
  file.path_ = path;
  file.code_ = code;
  struct stat info;
  if (fstat(file.fd_, &info) != 0) return SystemError(code, "stat", path, errno);
  if (S_ISDIR(info.st_mode)) return Error(code, path + " is a folder; a file is needed");
  if (!S_ISREG(info.st_mode)) return Error(code, path + " is not a regular file");
  return file;
}

absl::StatusOr<File> File::Create(const std::string& path, bool exclusive, ExitCode code) {
  File file;
  file.fd_ =
      open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | (exclusive ? O_EXCL : O_TRUNC), 0644);
  if (file.fd_ < 0) return SystemError(code, "create", path, errno);
  file.path_ = path;
  file.code_ = code;
  return file;
}

absl::StatusOr<File> File::OpenWrite(const std::string& path, ExitCode code) {
  File file;
  file.fd_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file.fd_ < 0) return SystemError(code, "open for writing", path, errno);
  file.path_ = path;
  file.code_ = code;
  return file;
}

absl::Status File::ReadAt(void* data, size_t size, int64_t offset) const {
  auto* out = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t got = pread(fd_, out, std::min(size, kMaxTransfer), offset);
    if (got < 0) {
      if (errno == EINTR) continue;
      return SystemError(code_, "read", path_ + " at byte " + std::to_string(offset), errno);
    }
    if (got == 0) {
      return Error(code_, path_ + " ends at byte " + std::to_string(offset) + ", " +
                              std::to_string(size) + " more bytes are needed");
    }
    out += got;
    offset += got;
    size -= static_cast<size_t>(got);
  }
  return absl::OkStatus();
}

absl::Status File::WriteAt(const void* data, size_t size, int64_t offset) const {
  const auto* in = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t put = pwrite(fd_, in, std::min(size, kMaxTransfer), offset);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      // POSIX leaves errno alone when pwrite returns 0; that means no progress is possible.
      return SystemError(code_, "write", path_ + " at byte " + std::to_string(offset),
                         put < 0 ? errno : ENOSPC);
    }
    in += put;
    offset += put;
    size -= static_cast<size_t>(put);
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> File::Size() const {
  struct stat info;
  if (fstat(fd_, &info) != 0) return SystemError(code_, "stat", path_, errno);
  return static_cast<int64_t>(info.st_size);
}

absl::Status File::Sync() const {
  if (fsync(fd_) != 0) return SystemError(code_, "fsync", path_, errno);
  return absl::OkStatus();
}

absl::Status File::Close() {
  if (fd_ < 0) return absl::OkStatus();
  // Linux releases the descriptor even when close fails: never retried.
  if (close(std::exchange(fd_, -1)) != 0) return SystemError(code_, "close", path_, errno);
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes, ExitCode code) {
  KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(path, code));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
  if (size > max_bytes) {
    return Error(code, path + " has " + std::to_string(size) + " bytes; at most " +
                           std::to_string(max_bytes) + " are accepted here");
  }
  std::string content(static_cast<size_t>(size), '\0');
  KRAIT_RETURN_IF_ERROR(file.ReadAt(content.data(), content.size(), 0));
  return content;
}

absl::Status WriteFileAtomic(const std::string& path, std::string_view content, ExitCode code) {
  // A fixed name: what a killed process left behind is replaced by the next write.
  const std::string temporary = path + ".tmp";
  KRAIT_RETURN_IF_ERROR(RemoveFile(temporary, code));
  const auto write = [&]() -> absl::Status {
    KRAIT_ASSIGN_OR_RETURN(File file, File::Create(temporary, /*exclusive=*/true, code));
    KRAIT_RETURN_IF_ERROR(file.WriteAt(content.data(), content.size(), 0));
    KRAIT_RETURN_IF_ERROR(file.Sync());
    KRAIT_RETURN_IF_ERROR(file.Close());
    return Rename(temporary, path, code);
  };
  if (absl::Status status = write(); !status.ok()) {
    unlink(temporary.c_str());
    return status;
  }
  return SyncDirectory(ParentFolder(path), code);
}

absl::Status SyncDirectory(const std::string& path, ExitCode code) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return SystemError(code, "open folder", path, errno);
  const int error = fsync(fd) != 0 ? errno : 0;
  close(fd);
  // Some network file systems cannot fsync a folder and say EINVAL.
  if (error != 0 && error != EINVAL) return SystemError(code, "fsync folder", path, error);
  return absl::OkStatus();
}

absl::Status Rename(const std::string& from, const std::string& to, ExitCode code) {
  if (std::rename(from.c_str(), to.c_str()) != 0) {
    return SystemError(code, "rename", from + " to " + to, errno);
  }
  return absl::OkStatus();
}

absl::Status MakeDirectories(const std::string& path, ExitCode code) {
  if (path.empty() || IsDirectory(path)) return absl::OkStatus();
  const std::string parent = ParentFolder(path);
  if (parent != path) KRAIT_RETURN_IF_ERROR(MakeDirectories(parent, code));
  if (mkdir(path.c_str(), 0777) != 0) {
    const int error = errno;
    if (error != EEXIST) return SystemError(code, "create folder", path, error);
    if (!IsDirectory(path)) return SystemError(code, "create folder", path, ENOTDIR);
    return absl::OkStatus();  // another process was faster
  }
  return SyncDirectory(parent, code);
}

absl::Status RemoveFile(const std::string& path, ExitCode code) {
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    return SystemError(code, "remove", path, errno);
  }
  return absl::OkStatus();
}

absl::Status RemoveAll(const std::string& path, ExitCode code) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) return Error(code, "cannot remove " + path + ": " + error.message());
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path, ExitCode code) {
  DIR* dir = opendir(path.c_str());
  if (dir == nullptr) return SystemError(code, "list folder", path, errno);
  std::vector<std::string> names;
  errno = 0;
  while (const dirent* entry = readdir(dir)) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
    errno = 0;
  }
  const int error = errno;
  closedir(dir);
  if (error != 0) return SystemError(code, "list folder", path, error);
  std::sort(names.begin(), names.end());
  return names;
}

std::string ParentFolder(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

bool Exists(const std::string& path) {
  struct stat info;
  return lstat(path.c_str(), &info) == 0;
}

bool IsDirectory(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

}  // namespace krait
