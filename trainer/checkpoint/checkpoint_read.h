// Reading files that may be damaged, or that the system may refuse to read, and what all ranks make
// of it together.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_READ_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_READ_H_

#include <cstdint>
#include <string>

#include "kernels/base/file.h"
#include "kernels/base/status.h"
#include "parallel/world.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

// Bytes, a multiple of every element size; read or write, CRC and copy of a piece share the cache.
inline constexpr int64_t kPiece = int64_t{256} << 10;

// What the system refuses says nothing about the bytes: not damage, which a load passes over, but
// an error that ends it (IsUnreadable). Both are kNoCheckpoint.
absl::Status Unreadable(const std::string& message);
bool IsUnreadable(const absl::Status& status);

// Whether there is anything of that name; what keeps this from being known is an error.
absl::StatusOr<bool> IsThere(const std::string& path);
// Opens a regular file, not a link to one.
absl::StatusOr<File> OpenRegular(const std::string& path);

// Reads bytes [begin, end) of a file into `out` and continues `crc` over them.
absl::Status ReadInto(const File& file, int64_t begin, int64_t end, char* out, uint32_t* crc);

// OpenCheckpoint without CheckBoxes.
absl::StatusOr<Checkpoint> ReadCheckpoint(const std::string& folder, World* world);

// Agree that keeps IsUnreadable: where one rank cannot read, none passes over. An error that is
// agreed already stays as it is.
absl::Status AgreeOnReading(World* world, const absl::Status& status);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_READ_H_
