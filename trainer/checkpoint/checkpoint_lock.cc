#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <ctime>
#include <system_error>
#include <utility>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {
namespace {

std::string HostName() {
  char host[256] = "";
  if (gethostname(host, sizeof(host) - 1) != 0) host[0] = '\0';
  return host;
}

std::string HolderText() {
  char started[32] = "";
  const time_t now = std::time(nullptr);
  tm parts;
  if (gmtime_r(&now, &parts) != nullptr) {
    std::strftime(started, sizeof(started), "%Y-%m-%dT%H:%M:%SZ", &parts);
  }
  return HostName() + " pid " + std::to_string(getpid()) + " since " + started + "\n";
}

// What flock says where the file system has no locks.
bool MeansNoLocks(int error) { return error == ENOSYS || error == EOPNOTSUPP || error == ENOLCK; }

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

std::string InUse(const std::string& folder, const std::string& holder) {
  return "the folder " + folder + " is in use by another krait (" + holder +
         "); stop that one, or choose another run_dir or checkpoint.dir";
}

}  // namespace

RunLock::RunLock(RunLock&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      path_(std::move(other.path_)),
      by_text_(other.by_text_),
      warning_(std::move(other.warning_)) {}

RunLock& RunLock::operator=(RunLock&& other) noexcept {
  if (this != &other) {
    std::swap(fd_, other.fd_);
    std::swap(path_, other.path_);
    std::swap(by_text_, other.by_text_);
    std::swap(warning_, other.warning_);
    other.Release();
  }
  return *this;
}

RunLock::~RunLock() { Release(); }

void RunLock::Release() {
  if (fd_ < 0) return;
  // The file stays: removing it could take the name from a process that has just locked it. Its
  // text goes where it is the lock; where that fails, the process that it names is gone soon.
  if (by_text_ && ftruncate(fd_, 0) != 0) by_text_ = false;
  close(std::exchange(fd_, -1));
}

absl::Status RunLock::TakeByText(const std::string& folder, const std::string& path) {
  by_text_ = true;
  warning_ = "the file system of " + folder +
             " has no file locks: a second krait in it is noticed on this host only";
  const std::string holder = ReadHolder(fd_);
  const size_t pid_at = holder.find(" pid ");
  if (pid_at == std::string::npos) return absl::OkStatus();  // let go of, or new
  if (holder.substr(0, pid_at) != HostName()) {
    warning_ += "; the last one there (" + holder + ") did not end by itself, or still runs";
    return absl::OkStatus();
  }
  const auto pid = static_cast<pid_t>(std::strtol(holder.c_str() + pid_at + 5, nullptr, 10));
  const bool alive = pid > 0 && pid != getpid() && (kill(pid, 0) == 0 || errno == EPERM);
  if (!alive) return absl::OkStatus();
  return Error(ExitCode::kConfig,
               InUse(folder, holder) + "; if that process is no krait, remove " + path);
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
    if (MeansNoLocks(errno)) {
      KRAIT_RETURN_IF_ERROR(lock.TakeByText(folder, path));
      break;
    }
    if (errno != EWOULDBLOCK) return failed("lock");
    return Error(ExitCode::kConfig, InUse(folder, ReadHolder(lock.fd_)));
  }
  const std::string text = HolderText();
  if (ftruncate(lock.fd_, 0) != 0 ||
      pwrite(lock.fd_, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
    return failed("write");
  }
  return lock;
}

}  // namespace krait
