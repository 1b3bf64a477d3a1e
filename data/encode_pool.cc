#include "data/encode_pool.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "data/json_texts.h"
#include "kernels/base/check.h"

namespace krait {
namespace {

bool IsBlank(const std::string& line) {
  return line.find_first_not_of(" \t\r") == std::string::npos;
}

// Documents are framed as the tokenizer does it by itself, and end with the end token.
class BatchEncoder {
 public:
  explicit BatchEncoder(Tokenizer* tokenizer)
      : tokenizer_(*tokenizer), suffix_(tokenizer->suffix()) {
    const std::optional<int32_t> end = tokenizer->end_token();
    if (end.has_value() && (suffix_.empty() || suffix_.back() != *end)) suffix_.push_back(*end);
  }

  EncodedBatch Encode(RecordBatch batch) const {
    EncodedBatch out;
    bool begins = batch.begins_document;
    for (Record& record : batch.records) {
      ++out.records;
      const bool last = record.ends_document;
      if (const absl::Status status = Add(batch.place, &record, begins, &out); !status.ok()) {
        out.bad.push_back(MessageOf(status));
      }
      begins = last;
      record.content = std::string();
    }
    return out;
  }

 private:
  absl::Status Add(const std::string& path, Record* record, bool begins, EncodedBatch* out) const {
    const auto place = [&] {
      if (record->kind == RecordKind::kText) return path;
      const char* between = record->kind == RecordKind::kLine ? ":" : ", record ";
      return absl::StrFormat("%s%s%d", path, between, record->number);
    };
    if (record->kind == RecordKind::kLine) {
      if (IsBlank(record->content)) return absl::OkStatus();
      KRAIT_ASSIGN_OR_RETURN(record->content, TextOfLine(record->content, place()));
    }
    if (record->content.empty()) {
      ++out->empty;
      return absl::OkStatus();
    }
    const size_t before = out->ids.size();
    if (begins) Append(tokenizer_.prefix(), out);
    if (const absl::Status status = tokenizer_.Encode(record->content, &out->ids); !status.ok()) {
      out->ids.resize(before);
      return Error(ExitCodeOf(status), place() + ": " + MessageOf(status));
    }
    out->text_bytes += static_cast<int64_t>(record->content.size());
    if (!record->ends_document) return absl::OkStatus();
    Append(suffix_, out);
    out->ends.push_back(static_cast<int64_t>(out->ids.size()));
    return absl::OkStatus();
  }

  static void Append(const std::vector<int32_t>& ids, EncodedBatch* out) {
    out->ids.insert(out->ids.end(), ids.begin(), ids.end());
  }

  Tokenizer& tokenizer_;
  std::vector<int32_t> suffix_;
};

}  // namespace

EncodePool::EncodePool(const Tokenizer& tokenizer, int threads)
    : most_(static_cast<size_t>(threads) * 3 + 1) {
  KRAIT_CHECK(threads > 0);
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back(
        [this, own = tokenizer.Share().release()] { Work(std::unique_ptr<Tokenizer>(own)); });
  }
}

EncodePool::~EncodePool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
    waiting_.clear();
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void EncodePool::Add(RecordBatch batch) {
  auto job = std::make_shared<Job>();
  job->batch = std::move(batch);
  in_order_.push_back(job);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(std::move(job));
  }
  changed_.notify_all();
}

EncodedBatch EncodePool::Next() {
  KRAIT_CHECK(!in_order_.empty());
  const std::shared_ptr<Job> job = in_order_.front();
  in_order_.pop_front();
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return job->done; });
  return std::move(job->result);
}

void EncodePool::Work(std::unique_ptr<Tokenizer> tokenizer) {
  const BatchEncoder encoder(tokenizer.get());
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return ending_ || !waiting_.empty(); });
    if (ending_) return;
    const std::shared_ptr<Job> job = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    EncodedBatch result = encoder.Encode(std::move(job->batch));
    lock.lock();
    job->result = std::move(result);
    job->done = true;
    changed_.notify_all();
  }
}

int UsableThreads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace krait
