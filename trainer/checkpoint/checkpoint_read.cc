#include "trainer/checkpoint/checkpoint_read.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "absl/strings/cord.h"
#include "kernels/base/crc32c.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;  // damage
constexpr char kUnreadable[] = "krait/unreadable";

absl::Status Unreadable(const std::string& path, int error) {
  return krait::Unreadable("cannot read " + path + ": " + std::generic_category().message(error));
}

bool NotThere(int error) { return error == ENOENT || error == ENOTDIR; }

}  // namespace

absl::Status Unreadable(const std::string& message) {
  absl::Status status = Error(kCode, message);
  status.SetPayload(kUnreadable, absl::Cord());
  return status;
}

bool IsUnreadable(const absl::Status& status) { return status.GetPayload(kUnreadable).has_value(); }

absl::StatusOr<bool> IsThere(const std::string& path) {
  struct stat info;
  if (lstat(path.c_str(), &info) == 0) return true;
  if (NotThere(errno)) return false;
  return Unreadable(path, errno);
}

absl::StatusOr<File> OpenRegular(const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(const bool there, IsThere(path));
  if (!there) return Error(kCode, path + " is missing");
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return Unreadable(path, errno);
  if (S_ISLNK(info.st_mode)) return Error(kCode, path + " is a symbolic link; not followed");
  if (!S_ISREG(info.st_mode)) return Error(kCode, path + " is not a regular file");
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return Unreadable(path, errno);
  close(fd);
  return File::OpenRead(path, kCode);
}

// Reads bytes [begin, end) of a file into `out` and continues `crc` over them.
absl::Status ReadInto(const File& file, int64_t begin, int64_t end, char* out, uint32_t* crc) {
  for (int64_t at = begin; at < end; at += kPiece, out += kPiece) {
    const auto n = static_cast<size_t>(std::min(kPiece, end - at));
    if (const absl::Status status = file.ReadAt(out, n, at); !status.ok()) {
      // A file that is too short is damaged; one that is long enough was refused by the system.
      const auto size = file.Size();
      const bool cut_off = size.ok() && *size < at + static_cast<int64_t>(n);
      return cut_off ? status : Unreadable(MessageOf(status));
    }
    *crc = Crc32c(out, n, *crc);
  }
  return absl::OkStatus();
}

absl::Status AgreeOnReading(World* world, const absl::Status& status) {
  if (IsAgreed(status)) return status;
  absl::Status agreed = Agree(world, status);
  if (agreed.ok() || world->size() == 1) return agreed;
  for (const int64_t refused : world->AllGather(int64_t{IsUnreadable(status)})) {
    if (refused != 0) agreed.SetPayload(kUnreadable, absl::Cord());
  }
  return agreed;
}

}  // namespace krait
