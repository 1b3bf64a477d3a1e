// Threads that turn batches of records into tokens, handed back in order.
#ifndef KRAIT_DATA_ENCODE_POOL_H_
#define KRAIT_DATA_ENCODE_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "data/records.h"
#include "data/tokenizer.h"

namespace krait {

// Records of one input, in order.
struct RecordBatch {
  std::string place;  // of the input, for messages
  std::vector<Record> records;
  bool begins_document = true;  // the first record
};

struct EncodedBatch {
  std::vector<int32_t> ids;
  std::vector<int64_t> ends;  // of the documents that end here, within `ids`
  int64_t records = 0, empty = 0, text_bytes = 0;
  std::vector<std::string> bad;  // a sentence for each record that is none
};

class EncodePool {
 public:
  EncodePool(const Tokenizer& tokenizer, int threads);
  ~EncodePool();
  EncodePool(const EncodePool&) = delete;
  EncodePool& operator=(const EncodePool&) = delete;

  // Full pools take no more: Next() makes room.
  bool full() const { return in_order_.size() >= most_; }
  bool empty() const { return in_order_.empty(); }
  void Add(RecordBatch batch);
  // The result of the oldest batch; waits for it. Not of an empty pool.
  EncodedBatch Next();

 private:
  struct Job {
    RecordBatch batch;
    EncodedBatch result;
    bool done = false;
  };
  void Work(std::unique_ptr<Tokenizer> tokenizer);

  size_t most_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Job>> waiting_;
  std::deque<std::shared_ptr<Job>> in_order_;  // of the owner's thread alone
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

// The threads that this process may run at once.
int UsableThreads();

}  // namespace krait

#endif  // KRAIT_DATA_ENCODE_POOL_H_
