#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>
#include <system_error>
#include <utility>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {
namespace {

std::string HolderText() {
  char host[256] = "";
  if (gethostname(host, sizeof(host) - 1) != 0) host[0] = '\0';
  char started[32] = "";
  const time_t now = std::time(nullptr);
  tm parts;
  if (gmtime_r(&now, &parts) != nullptr) {
    std::strftime(started, sizeof(started), "%Y-%m-%dT%H:%M:%SZ", &parts);
  }
  return std::string(host) + " pid " + std::to_string(getpid()) + " since " + started + "\n";
}

// The first line, printable; the file is another process's.
std::string ReadHolder(int fd) {
  char text[300];
  const ssize_t size = pread(fd, text, sizeof(text), 0);
  std::string holder;
  for (ssize_t i = 0; i < size && text[i] != '\n'; ++i) {
    holder += text[i] >= 0x20 && text[i] < 0x7F ? text[i] : '?';
  }
  return holder.empty() ? "unknown" : holder;
}

}  // namespace

RunLock::RunLock(RunLock&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

RunLock& RunLock::operator=(RunLock&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    fd_ = std::exchange(other.fd_, -1);
    path_ = std::move(other.path_);
  }
  return *this;
}

RunLock::~RunLock() {
  // The file stays: removing it could take the name from a process that has just locked it.
  if (fd_ >= 0) close(fd_);
}

bool RunLock::Holds() const {
  struct stat held, named;
  return fd_ >= 0 && fstat(fd_, &held) == 0 && stat(path_.c_str(), &named) == 0 &&
         held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

absl::StatusOr<RunLock> RunLock::Acquire(const std::string& folder, const std::string& file) {
  KRAIT_RETURN_IF_ERROR(MakeDirectories(folder, ExitCode::kCannotSave));
  const std::string path = folder + "/" + file;
  RunLock lock;
  lock.path_ = path;
  lock.fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  const auto failed = [&](const char* operation) {
    return Error(ExitCode::kCannotSave, std::string("cannot ") + operation + " " + path + ": " +
                                            std::generic_category().message(errno));
  };
  if (lock.fd_ < 0) return failed("open");
  while (flock(lock.fd_, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return failed("lock");
    return Error(ExitCode::kConfig, "the folder " + folder + " is in use by another krait (" +
                                        ReadHolder(lock.fd_) +
                                        "); stop that one, or choose another run_dir or "
                                        "checkpoint.dir");
  }
  const std::string text = HolderText();
  if (ftruncate(lock.fd_, 0) != 0 ||
      pwrite(lock.fd_, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
    return failed("write");
  }
  return lock;
}

}  // namespace krait
