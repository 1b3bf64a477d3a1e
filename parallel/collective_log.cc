#include "parallel/collective_log.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/base/clock.h"
#include "kernels/cuda/runtime.h"

namespace krait {
namespace {

constexpr size_t kKept = 64;
constexpr double kLockSeconds = 1;

struct Record {
  uint64_t number = 0;  // from 1 on; 0: none
  std::array<char, 56> name{};
  CollectiveShape shape;
  double begun = 0, ended = 0;  // ended 0: not yet
  int waits_for = -1;
  bool on_gpu = false;  // ends with the event of its place
};

std::mutex g_mutex;  // of all but the counter
std::array<Record, kKept> g_records;
std::array<void*, kKept> g_ends;  // cudaEvent_t, made when first needed
uint64_t g_last = 0;
std::atomic<uint64_t> g_events = 0;

Record& At(uint64_t number) { return g_records[number % kKept]; }

std::string Description(const Record& record) {
  char text[192];
  std::snprintf(text, sizeof text, "%s (%d ranks, %d to %d)", record.name.data(),
                record.shape.ranks, record.shape.first_rank, record.shape.last_rank);
  std::string all = text;
  if (record.ended == 0 && record.waits_for >= 0) {
    all += ", waiting for rank " + std::to_string(record.waits_for);
  }
  return all;
}

}  // namespace

CollectiveScope::CollectiveScope(std::string_view name, const CollectiveShape& shape) {
  const std::lock_guard lock(g_mutex);
  number_ = ++g_last;
  Record& record = At(number_);
  record = {.number = number_, .shape = shape, .begun = MonotonicSeconds()};
  std::memcpy(record.name.data(), name.data(), std::min(name.size(), record.name.size() - 1));
  ++g_events;
}

CollectiveScope::~CollectiveScope() {
  const std::lock_guard lock(g_mutex);
  if (Record& record = At(number_); record.number == number_) record.ended = MonotonicSeconds();
  ++g_events;
}

void CollectiveScope::WaitsFor(int rank) {
  const std::lock_guard lock(g_mutex);
  if (Record& record = At(number_); record.number == number_) record.waits_for = rank;
}

void CollectiveScope::Enqueued(void* stream) {
  const std::lock_guard lock(g_mutex);
  Record& record = At(number_);
  if (record.number != number_) return;
  void*& end = g_ends[number_ % kKept];
  if (end == nullptr) end = cuda::CreateEvent(/*timed=*/false);
  cuda::RecordEvent(end, stream);
  record.on_gpu = true;
}

uint64_t CollectivesSoFar() { return g_events; }

CollectiveReport ReportCollectives() {
  std::unique_lock lock(g_mutex, std::defer_lock);
  for (const double until = MonotonicSeconds() + kLockSeconds; !lock.try_lock();) {
    if (MonotonicSeconds() > until) return {"", {"a thread stands still while it writes the log"}};
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  CollectiveReport report;
  const double now = MonotonicSeconds();
  for (uint64_t number = g_last; number > 0 && number + kKept > g_last; --number) {
    const Record& record = At(number);
    const bool waiting = record.on_gpu && !cuda::EventHappened(g_ends[number % kKept]);
    // What a GPU has not done holds up all that was enqueued later.
    if (waiting || (record.ended == 0 && report.current.empty())) {
      report.current = Description(record);
    }
    char times[160];
    std::snprintf(times, sizeof times, ", %lld bytes out, %lld in, begun %.3f s ago, ",
                  static_cast<long long>(record.shape.bytes_sent),
                  static_cast<long long>(record.shape.bytes_received), now - record.begun);
    char end[64] = "not done";
    if (record.ended > 0) {
      std::snprintf(end, sizeof end, "done in %.3f ms", 1000 * (record.ended - record.begun));
    }
    if (record.on_gpu) {
      std::snprintf(end, sizeof end, "%s by the GPU", waiting ? "not done" : "done");
    }
    std::string line = std::to_string(number);
    line.append(": ").append(Description(record)).append(times).append(end);
    report.lines.push_back(std::move(line));
  }
  return report;
}

}  // namespace krait
