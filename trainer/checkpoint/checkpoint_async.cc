#include "trainer/checkpoint/checkpoint_async.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/transfer.h"
#include "trainer/checkpoint/checkpoint_ranks.h"

namespace krait {

AsyncSaver::AsyncSaver(World* world) : world_(OrAlone(world)) {}

AsyncSaver::~AsyncSaver() {
  if (thread_.joinable()) thread_.join();
}

int64_t AsyncSaver::StagingBytes(const std::vector<CheckpointBox>& boxes) {
  int64_t bytes = 0;
  for (const CheckpointBox& box : boxes) bytes += box.bytes();
  return bytes;
}

void AsyncSaver::Run(std::function<void()> work) {
  finished_ = false;
  try {
    thread_ = std::thread([this, work] {
      work();
      finished_ = true;
    });
  } catch (const std::system_error&) {
    // Without a thread the save is one that is waited for.
    work();
    finished_ = true;
  }
}

absl::Status AsyncSaver::Start(const SaveOptions& options, const CheckpointMeta& meta,
                               const std::vector<CheckpointBox>& boxes, void* staging,
                               int64_t staging_bytes, const Context& ctx) {
  KRAIT_RETURN_IF_ERROR(Wait());
  KRAIT_CHECK(StagingBytes(boxes) <= staging_bytes);
  warnings_.clear();
  KRAIT_ASSIGN_OR_RETURN(save_, BeginSave(options, meta, boxes, &warnings_, world_));
  std::vector<CheckpointBox> copies = boxes;
  char* to = static_cast<char*>(staging);
  for (CheckpointBox& box : copies) {
    Download(to, box.values(), ctx);
    box.data = to;
    box.device = Device::kCpu;
    to += box.bytes();
  }
  stage_ = Stage::kWriting;
  Run([this, copies = std::move(copies)] {
    report_ = WriteShard(save_, world_->rank(), copies);
    if (world_->size() == 1) result_ = EndSave(save_, {report_}, &warnings_);
  });
  return absl::OkStatus();
}

std::optional<absl::Status> AsyncSaver::Advance() {
  if (!busy()) return std::nullopt;
  if (thread_.joinable()) thread_.join();
  if (stage_ == Stage::kWriting && world_->size() > 1) {
    const std::vector<std::string> reports = world_->AllGather(report_);
    stage_ = Stage::kEnding;
    if (world_->first()) {
      Run([this, reports] { result_ = EndSave(save_, reports, &warnings_); });
    } else {
      result_ = absl::OkStatus();
    }
    return std::nullopt;
  }
  stage_ = Stage::kNone;
  return StatusOfFirst(world_, result_);
}

std::optional<absl::Status> AsyncSaver::Poll() {
  while (busy()) {
    const std::vector<int64_t> all = world_->AllGather(int64_t{ready()});
    if (std::find(all.begin(), all.end(), 0) != all.end()) return std::nullopt;
    if (auto result = Advance(); result.has_value()) return result;
  }
  return std::nullopt;
}

absl::Status AsyncSaver::Wait() {
  while (busy()) {
    if (const auto result = Advance(); result.has_value()) return *result;
  }
  return absl::OkStatus();
}

}  // namespace krait
