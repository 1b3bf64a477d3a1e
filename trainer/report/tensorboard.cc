#include "trainer/report/tensorboard.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>

#include "kernels/base/clock.h"
#include "kernels/base/crc32c.h"

namespace krait {
namespace {

static_assert(std::endian::native == std::endian::little);

template <typename T>
void AppendRaw(std::string* out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out->append(bytes, sizeof(T));
}

// Protocol buffer encoding: a field is a varint (number << 3 | wire type) and its value.
void AppendVarint(std::string* out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}
void AppendVarintField(std::string* out, int number, uint64_t value) {
  AppendVarint(out, static_cast<uint64_t>(number) << 3);
  AppendVarint(out, value);
}
void AppendBytesField(std::string* out, int number, std::string_view value) {
  AppendVarint(out, static_cast<uint64_t>(number) << 3 | 2);
  AppendVarint(out, value.size());
  out->append(value);
}

uint32_t MaskedCrc(std::string_view data) {
  const uint32_t crc = Crc32c(data.data(), data.size());
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

// Event: wall_time = 1 (double), step = 2 (int64).
std::string EventStart(int64_t step) {
  std::string event;
  AppendVarint(&event, 1 << 3 | 1);
  AppendRaw(&event, UnixSeconds());
  AppendVarintField(&event, 2, static_cast<uint64_t>(step));
  return event;
}

constexpr char kEventFile[] = "events.out.tfevents.";

// The number of seconds for a new file's name. TensorBoard reads the files of a folder in the order
// of their names: the new one comes after all that are there, whatever this machine's clock says.
absl::StatusOr<int64_t> NextSeconds(const std::string& folder) {
  auto seconds = static_cast<int64_t>(UnixSeconds());
  std::vector<std::string> names;
  KRAIT_ASSIGN_OR_RETURN(names, ListDirectory(folder, ExitCode::kCannotSave));
  for (const std::string& name : names) {
    if (!name.starts_with(kEventFile)) continue;
    int64_t there = 0;
    const char* begin = name.data() + sizeof(kEventFile) - 1;
    const auto parsed = std::from_chars(begin, name.data() + name.size(), there);
    // With other than ten digits the order of names would not be that of numbers.
    if (parsed.ec == std::errc() && parsed.ptr == begin + 10) {
      seconds = std::max(seconds, there + 1);
    }
  }
  return seconds;
}

}  // namespace

std::string TfRecord(std::string_view data) {
  std::string record;
  AppendRaw(&record, static_cast<uint64_t>(data.size()));
  AppendRaw(&record, MaskedCrc(record));
  record.append(data);
  AppendRaw(&record, MaskedCrc(data));
  return record;
}

absl::StatusOr<EventWriter> EventWriter::Create(const std::string& folder, int64_t first_step) {
  KRAIT_RETURN_IF_ERROR(MakeDirectories(folder, ExitCode::kCannotSave));
  char host[256] = "localhost";
  gethostname(host, sizeof(host) - 1);
  int64_t seconds = 0;
  KRAIT_ASSIGN_OR_RETURN(seconds, NextSeconds(folder));
  const std::string path = folder + "/" + kEventFile + std::to_string(seconds) + "." + host + "." +
                           std::to_string(getpid());
  EventWriter writer;
  KRAIT_ASSIGN_OR_RETURN(writer.file_,
                         File::Create(path, /*exclusive=*/false, ExitCode::kCannotSave));
  std::string version = EventStart(0);
  AppendBytesField(&version, 3, "brain.Event:2");  // Event.file_version
  KRAIT_RETURN_IF_ERROR(writer.Write(version));
  std::string start = EventStart(first_step);
  std::string session;
  AppendVarintField(&session, 1, 1);     // SessionLog.status = START
  AppendBytesField(&start, 7, session);  // Event.session_log
  KRAIT_RETURN_IF_ERROR(writer.Write(start));
  return writer;
}

absl::Status EventWriter::Scalars(int64_t step,
                                  const std::vector<std::pair<std::string, double>>& values) {
  std::string summary;
  for (const auto& [tag, number] : values) {
    std::string value;
    AppendBytesField(&value, 1, tag);  // Summary.Value.tag
    AppendVarint(&value, 2 << 3 | 5);  // Summary.Value.simple_value (float)
    AppendRaw(&value, static_cast<float>(number));
    AppendBytesField(&summary, 1, value);  // Summary.value
  }
  std::string event = EventStart(step);
  AppendBytesField(&event, 5, summary);  // Event.summary
  return Write(event);
}

absl::Status EventWriter::Write(std::string_view event) {
  const std::string record = TfRecord(event);
  KRAIT_RETURN_IF_ERROR(file_.WriteAt(record.data(), record.size(), offset_));
  offset_ += static_cast<int64_t>(record.size());
  return absl::OkStatus();
}

}  // namespace krait
