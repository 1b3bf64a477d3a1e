// TensorBoard event files without protobuf: scalars only.
//
// A file is a list of TFRecords (u64 length, masked CRC32C of the length, data, masked CRC32C of
// the data; tensorflow/core/lib/io/record_writer.h), each an Event message
// (tensorflow/core/util/event.proto), written field by field.
#ifndef KRAIT_TRAINER_REPORT_TENSORBOARD_H_
#define KRAIT_TRAINER_REPORT_TENSORBOARD_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/base/file.h"

namespace krait {

// One event file of one process. Errors lead to kCannotSave.
class EventWriter {
 public:
  // A new file events.out.tfevents.SECONDS.HOST.PID in `folder` (made when missing); its name comes
  // after those there, also where the clock says otherwise. `first_step` is the first step to come:
  // TensorBoard then forgets what older files say about it and later.
  static absl::StatusOr<EventWriter> Create(const std::string& folder, int64_t first_step);

  // The values of one step, as one event.
  absl::Status Scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values);

  const std::string& path() const { return file_.path(); }

 private:
  absl::Status Write(std::string_view event);

  File file_;
  int64_t offset_ = 0;
};

// A TFRecord of `data`.
std::string TfRecord(std::string_view data);

}  // namespace krait

#endif  // KRAIT_TRAINER_REPORT_TENSORBOARD_H_
