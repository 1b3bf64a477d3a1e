#include "data/inputs.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "kernels/base/file.h"
#include "kernels/base/stop_signals.h"

namespace krait {
namespace {

using FileId = std::pair<uint64_t, uint64_t>;

int64_t ChangedAt(const struct stat& info) {
  return info.st_mtim.tv_sec * int64_t{1'000'000'000} + info.st_mtim.tv_nsec;
}

class Finder {
 public:
  Finder(const BuildOptions& options, BuildReport* report) : options_(options), report_(*report) {}

  // The files that a path of the user's stands for.
  absl::Status List(const std::string& path) {
    struct stat info = {};
    if (stat(path.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
      KRAIT_RETURN_IF_ERROR(File::OpenRead(path, ExitCode::kData).status());
      inputs_.push_back(
          {.path = path, .named = true, .bytes = info.st_size, .changed_ns = ChangedAt(info)});
      return absl::OkStatus();
    }
    std::vector<Input> found;
    std::set<FileId> seen = {{info.st_dev, info.st_ino}};
    KRAIT_RETURN_IF_ERROR(ListFolder(path, &seen, &found));
    // A link to a file that is read under its own name, or by a link before it, adds nothing.
    std::set<FileId> files;
    for (const Input& input : found) {
      if (!input.linked) files.insert(input.id);
    }
    std::erase_if(found, [&](const Input& input) {
      const bool again = input.linked && !files.insert(input.id).second;
      report_.repeated_files += again ? 1 : 0;
      return again;
    });
    std::sort(found.begin(), found.end(),
              [](const Input& a, const Input& b) { return a.path < b.path; });
    inputs_.insert(inputs_.end(), found.begin(), found.end());
    return absl::OkStatus();
  }

  std::vector<Input> inputs_;

 private:
  // Adds the files in a folder and below. `seen`: the folders gone through.
  absl::Status ListFolder(const std::string& folder, std::set<FileId>* seen,
                          std::vector<Input>* found) {
    KRAIT_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                           ListDirectory(folder, ExitCode::kData));
    for (const std::string& name : names) {
      if (name.starts_with('.')) {
        ++report_.hidden;
        continue;
      }
      KRAIT_RETURN_IF_ERROR(CheckStop(options_));
      const std::string path = folder + "/" + name;
      struct stat entry = {}, target = {};
      if (lstat(path.c_str(), &entry) != 0 || stat(path.c_str(), &target) != 0) {
        // A link to nowhere, or to itself.
        if (S_ISLNK(entry.st_mode) && (errno == ENOENT || errno == ELOOP)) {
          ++report_.skipped_files;
          continue;
        }
        return Error(ExitCode::kData, "cannot look up " + path + ": " + std::strerror(errno));
      }
      const FileId id = {target.st_dev, target.st_ino};
      if (S_ISDIR(target.st_mode)) {
        if (seen->insert(id).second) {
          KRAIT_RETURN_IF_ERROR(ListFolder(path, seen, found));
        } else {
          ++report_.repeated_folders;
        }
      } else if (S_ISREG(target.st_mode)) {
        found->push_back({.path = path,
                          .linked = S_ISLNK(entry.st_mode),
                          .id = id,
                          .bytes = target.st_size,
                          .changed_ns = ChangedAt(target)});
      } else {
        ++report_.skipped_files;
      }
    }
    return absl::OkStatus();
  }

  const BuildOptions& options_;
  BuildReport& report_;
};

}  // namespace

absl::Status CheckStop(const BuildOptions& options) {
  if (!StopRequested()) return absl::OkStatus();
  return Error(ExitCode::kStopped, "stopped on request: " + options.out + " was not written");
}

absl::StatusOr<std::vector<Input>> FindInputs(const BuildOptions& options, BuildReport* report) {
  Finder finder(options, report);
  ErrorList errors;
  for (const std::string& path : options.paths) {
    const absl::Status listed = finder.List(path);
    KRAIT_RETURN_IF_ERROR(CheckStop(options));  // alone, not beside what it cut short
    errors.Add(listed);
  }
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  return std::move(finder.inputs_);
}

bool IsCompressed(const std::string& path) {
  return absl::EndsWithIgnoreCase(path, ".gz") || absl::EndsWithIgnoreCase(path, ".zst");
}

bool HasEnding(const std::string& path, const std::string& ending) {
  return absl::EndsWithIgnoreCase(path, ending) || absl::EndsWithIgnoreCase(path, ending + ".gz") ||
         absl::EndsWithIgnoreCase(path, ending + ".zst");
}

}  // namespace krait
