#include "trainer/checkpoint/run_record.h"

#include "absl/strings/str_format.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {
namespace {

using nlohmann::json;

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;

std::string LastPart(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

}  // namespace

std::string RunRecordPath(const std::string& run_dir) { return run_dir + "/last_checkpoint.json"; }

absl::StatusOr<std::optional<RunRecord>> ReadRunRecord(const std::string& run_dir) {
  const std::string path = RunRecordPath(run_dir);
  if (!Exists(path)) return std::optional<RunRecord>();
  KRAIT_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, 1 << 20, kCode));
  const auto unusable = [&path](const std::string& why) {
    return Error(kCode, path + " does not say which checkpoint was saved last (" + why +
                            "); remove it to go on from the newest one there is in "
                            "checkpoint.dir, or from --resume PATH");
  };
  const auto parsed = ParseJson(text, "JSON", kCode, /*max_depth=*/4);
  if (!parsed.ok()) return unusable(MessageOf(parsed.status()));
  const json& root = *parsed;
  RunRecord record;
  try {
    record.path = root.at("path").get<std::string>();
    record.save_id = root.at("save_id").get<std::string>();
    record.step = root.at("step").get<int64_t>();
    record.followed = root.value("followed", "");
    record.followed_step = root.value("followed_step", int64_t{0});
  } catch (const json::exception& error) {
    return unusable(error.what());
  }
  return std::optional<RunRecord>(record);
}

absl::Status WriteRunRecord(const std::string& run_dir, const RunRecord& record) {
  const json root = {{"path", record.path},
                     {"save_id", record.save_id},
                     {"step", record.step},
                     {"followed", record.followed},
                     {"followed_step", record.followed_step}};
  return WriteFileAtomic(RunRecordPath(run_dir),
                         root.dump(2, ' ', false, json::error_handler_t::replace) + "\n",
                         ExitCode::kCannotSave);
}

absl::Status CheckRecorded(const RunRecord& record, const std::string& dir,
                           const std::vector<std::string>& folders) {
  std::string newest;
  for (const std::string& folder : folders) {
    const auto checkpoint = ReadManifest(folder);
    if (checkpoint.ok() ? checkpoint->save_id == record.save_id
                        : LastPart(folder) == LastPart(record.path)) {
      return absl::OkStatus();
    }
    // A run that was killed between its first save after a --resume PATH and the record of it.
    if (checkpoint.ok() && !record.followed.empty() && record.step == record.followed_step &&
        checkpoint->meta.step > record.step) {
      return absl::OkStatus();
    }
    if (newest.empty() && checkpoint.ok()) {
      newest = absl::StrFormat("the newest one there is step %d, of another save",
                               checkpoint->meta.step);
    }
  }
  if (newest.empty()) newest = "there is none";
  return Error(
      kCode, absl::StrFormat("the last checkpoint of this run is step %d, %s, but checkpoint.dir "
                             "%s does not hold it: %s.\nNothing was started. Mount its disk or set "
                             "checkpoint.dir to its folder; or add --resume PATH to go on from a "
                             "checkpoint that you name, or --resume never to train anew",
                             record.step, record.path, dir, newest));
}

}  // namespace krait
