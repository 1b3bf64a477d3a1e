// The last collectives of this process, kept for the report about a job that hangs. Any thread.
#ifndef KRAIT_PARALLEL_COLLECTIVE_LOG_H_
#define KRAIT_PARALLEL_COLLECTIVE_LOG_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

// The ranks that take part and what this one moves.
struct CollectiveShape {
  int first_rank = 0, last_rank = 0, ranks = 1;
  int64_t bytes_sent = 0, bytes_received = 0;
};

// A collective from here to the end of the scope. Its name is copied, as far as there is room.
class CollectiveScope {
 public:
  CollectiveScope(std::string_view name, const CollectiveShape& shape);
  ~CollectiveScope();
  CollectiveScope(const CollectiveScope&) = delete;
  CollectiveScope& operator=(const CollectiveScope&) = delete;

  // The rank that has not come yet.
  void WaitsFor(int rank);
  // Of a collective that runs on a GPU: it is enqueued on `stream`, a cudaStream_t, and ends when
  // the stream has come behind it.
  void Enqueued(void* stream);

 private:
  uint64_t number_;
};

// How many collectives have begun or ended.
uint64_t CollectivesSoFar();

// What this process is in, "all-gather of w (ranks 0 to 3), waiting for rank 2", and a line for
// each of the last ones, the newest first. Waits for no other thread: where one was stopped while
// it wrote the log, they say so instead.
struct CollectiveReport {
  std::string current;  // "": none
  std::vector<std::string> lines;
};
CollectiveReport ReportCollectives();

}  // namespace krait

#endif  // KRAIT_PARALLEL_COLLECTIVE_LOG_H_
