#include "trainer/checkpoint/checkpoint_async.h"

#include <exception>
#include <new>
#include <system_error>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/transfer.h"

namespace krait {

namespace {

// An exception must not leave the thread: it would end the process, unsaved.
absl::Status SaveCatching(const SaveOptions& options, const CheckpointMeta& meta,
                          const std::vector<CheckpointBox>& boxes,
                          std::vector<std::string>* warnings) {
  const std::string what = "cannot save step " + std::to_string(meta.step) + " in " + options.dir;
  try {
    return SaveCheckpoint(options, meta, boxes, warnings);
  } catch (const std::bad_alloc&) {
    return Error(ExitCode::kOutOfMemory, what + ": out of memory");
  } catch (const std::exception& error) {
    return Error(ExitCode::kCannotSave, what + ": " + error.what());
  }
}

}  // namespace

AsyncSaver::~AsyncSaver() {
  if (thread_.joinable()) thread_.join();
}

int64_t AsyncSaver::StagingBytes(const std::vector<CheckpointBox>& boxes) {
  int64_t bytes = 0;
  for (const CheckpointBox& box : boxes) bytes += box.bytes();
  return bytes;
}

absl::Status AsyncSaver::Start(const SaveOptions& options, const CheckpointMeta& meta,
                               const std::vector<CheckpointBox>& boxes, void* staging,
                               int64_t staging_bytes, const Context& ctx) {
  KRAIT_RETURN_IF_ERROR(Wait());
  KRAIT_CHECK(StagingBytes(boxes) <= staging_bytes);
  std::vector<CheckpointBox> copies = boxes;
  char* to = static_cast<char*>(staging);
  for (CheckpointBox& box : copies) {
    Download(to, box.values(), ctx);
    box.data = to;
    box.device = Device::kCpu;
    to += box.bytes();
  }
  finished_ = false;
  warnings_.clear();
  try {
    thread_ = std::thread([this, options, meta = meta, boxes = std::move(copies)] {
      result_ = SaveCatching(options, meta, boxes, &warnings_);
      finished_ = true;
    });
  } catch (const std::system_error& error) {
    return Error(ExitCode::kCannotSave,
                 std::string("cannot start a thread for saving: ") + error.what());
  }
  return absl::OkStatus();
}

std::optional<absl::Status> AsyncSaver::Poll() {
  if (!thread_.joinable() || !finished_) return std::nullopt;
  return Wait();
}

absl::Status AsyncSaver::Wait() {
  if (!thread_.joinable()) return absl::OkStatus();
  thread_.join();
  return result_;
}

}  // namespace krait
