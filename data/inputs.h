// The files that `data build` reads, found in the paths that it is given (token_file.h).
#ifndef KRAIT_DATA_INPUTS_H_
#define KRAIT_DATA_INPUTS_H_

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "data/token_file.h"
#include "kernels/base/status.h"

namespace krait {

// kStopped after a request to stop (kernels/base/stop_signals.h).
absl::Status CheckStop(const BuildOptions& options);

struct Input {
  std::string path;
  bool named = false;                     // by the user, not found in a folder
  bool linked = false;                    // by a symbolic link in a folder
  std::pair<uint64_t, uint64_t> id = {};  // device and inode
  int64_t bytes = 0;
  int64_t changed_ns = 0;  // time of its last change
};

// In the order of `paths`, those of a folder in the order of their paths. The report gets the
// counts of what is passed over. All errors at once: what cannot be looked up or opened.
absl::StatusOr<std::vector<Input>> FindInputs(const BuildOptions& options, BuildReport* report);

// By its name: .gz, .zst.
bool IsCompressed(const std::string& path);
// Ends with `ending`, also before .gz and .zst.
bool HasEnding(const std::string& path, const std::string& ending);

}  // namespace krait

#endif  // KRAIT_DATA_INPUTS_H_
