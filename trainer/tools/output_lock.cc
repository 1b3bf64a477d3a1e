#include "trainer/tools/output_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "kernels/base/file.h"

namespace krait {

OutputLock::OutputLock(OutputLock&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), file_(std::move(other.file_)) {}

OutputLock& OutputLock::operator=(OutputLock&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(file_, other.file_);
  return *this;
}

OutputLock::~OutputLock() {
  if (fd_ < 0) return;
  // Before it is let go: behind that it may be another process's.
  (void)unlink(file_.c_str());
  close(fd_);
}

absl::StatusOr<OutputLock> OutputLock::Acquire(const std::string& option, const std::string& path) {
  std::string name = path;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  name += ".lock";
  KRAIT_RETURN_IF_ERROR(MakeDirectories(ParentFolder(name), ExitCode::kCannotSave));
  while (true) {
    OutputLock lock;
    const int fd = open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0) return lock;
    int locked = 0;
    do {
      locked = flock(fd, LOCK_EX | LOCK_NB);
    } while (locked != 0 && errno == EINTR);
    if (locked != 0) {
      const bool taken = errno == EWOULDBLOCK;
      close(fd);
      if (!taken) return lock;
      return Error(ExitCode::kConfig, option + " " + path +
                                          " is being written by another krait, which holds " +
                                          name + ": wait for it, or name another folder");
    }
    // The one who had it may have removed it between the two calls.
    struct stat held, named;
    const bool same = fstat(fd, &held) == 0 && stat(name.c_str(), &named) == 0 &&
                      held.st_dev == named.st_dev && held.st_ino == named.st_ino;
    if (!same) {
      close(fd);
      continue;
    }
    lock.fd_ = fd;
    lock.file_ = name;
    return lock;
  }
}

}  // namespace krait
