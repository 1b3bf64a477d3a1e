#include "kernels/base/output.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "kernels/base/file.h"

namespace krait {
namespace {

constexpr size_t kHeadBytes = 16;

const char* Name(FileKind kind) {
  switch (kind) {
    case FileKind::kJson:
      return "JSON file";
    case FileKind::kHdf5:
      return "HDF5 file";
    case FileKind::kSafetensors:
      return "safetensors file";
  }
  return "";
}

// `head`: the first bytes of a file of `size`.
bool IsOf(FileKind kind, const std::string& head, int64_t size) {
  switch (kind) {
    case FileKind::kJson: {
      const size_t first = head.find_first_not_of(" \t\r\n");
      return first != std::string::npos && (head[first] == '{' || head[first] == '[');
    }
    case FileKind::kHdf5:
      return head.starts_with("\x89HDF\r\n\x1a\n");
    case FileKind::kSafetensors: {
      // The length of the JSON header, little-endian, then the header.
      uint64_t length = 0;
      if (head.size() < 9) return false;
      std::memcpy(&length, head.data(), 8);
      return head[8] == '{' && length <= static_cast<uint64_t>(size - 8);
    }
  }
  return false;
}

}  // namespace

absl::Status CheckOutput(const std::string& path, FileKind kind,
                         const std::vector<std::string>& inputs, bool force) {
  const auto refuse = [&](const std::string& why) {
    return Error(ExitCode::kConfig, "cannot write " + path + ": " + why);
  };
  struct stat out = {};
  if (stat(path.c_str(), &out) != 0) {
    return errno == ENOENT ? absl::OkStatus() : refuse(std::strerror(errno));
  }
  if (S_ISDIR(out.st_mode)) return refuse("it is a folder; name a file");
  if (!S_ISREG(out.st_mode)) return refuse("it is a device or a pipe; name a file");
  for (const std::string& input : inputs) {
    struct stat in = {};
    if (stat(input.c_str(), &in) == 0 && in.st_dev == out.st_dev && in.st_ino == out.st_ino) {
      return refuse("it is the input " + input + "; name another file");
    }
  }
  if (out.st_size == 0) return absl::OkStatus();
  KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(path, ExitCode::kConfig));
  std::string head(std::min(kHeadBytes, static_cast<size_t>(out.st_size)), '\0');
  KRAIT_RETURN_IF_ERROR(file.ReadAt(head.data(), head.size(), 0));
  if (!IsOf(kind, head, out.st_size)) {
    return refuse(std::string("it exists and is no ") + Name(kind) +
                  "; name another file, or remove it first");
  }
  if (!force) return refuse("it exists; name another file, or add --force to replace it");
  return absl::OkStatus();
}

}  // namespace krait
