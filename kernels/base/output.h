// What a file that a command is told to write may replace.
#ifndef KRAIT_KERNELS_BASE_OUTPUT_H_
#define KRAIT_KERNELS_BASE_OUTPUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

enum class FileKind : uint8_t { kJson, kHdf5, kSafetensors };

// kConfig, with the path and the reason, when `path` is a folder, a device or a pipe, one of
// `inputs` under whatever name, or a file that does not begin as one of `kind` does. A missing or
// empty file may be written, and with `force` an older one of its kind. To be called before any
// work is done.
absl::Status CheckOutput(const std::string& path, FileKind kind,
                         const std::vector<std::string>& inputs, bool force);

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_OUTPUT_H_
