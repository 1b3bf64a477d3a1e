#include "parallel/tcp.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "parallel/collective_log.h"
#include "parallel/tcp_meeting.h"
#include "parallel/watchdog.h"

namespace krait {
namespace {

constexpr int kAbortSeconds = 5;
constexpr double kHangSeconds = 600;  // until the config says otherwise
constexpr int kCauseSeconds = 3;      // in which the watch knows why a connection is gone
constexpr double kCloseSeconds = 5;   // for the others to leave after the end

// What travels on the watch: that all ranks end, and whose doing it is.
struct Notice {
  int32_t code = 0, rank = 0;
};

// Before each message, so that ranks that do different things notice.
enum class Kind : uint32_t { kNumber, kText, kBroadcast, kMessage, kBye };
struct Header {
  uint64_t bytes = 0;
  uint32_t number = 0;  // of the operation
  Kind kind = Kind::kBye;
};

// The watch over the other ranks: a thread, and what ends them.
class Watch {
 public:
  Watch(int rank, bool speaks, std::vector<TcpPeer>* peers)
      : rank_(rank), speaks_(speaks), peers_(peers), wake_(eventfd(0, EFD_CLOEXEC)) {
    KRAIT_CHECK(wake_.open());
    thread_ = std::thread([this] { Run(); });
  }
  ~Watch() { Stop(); }

  void Stop() {
    if (!thread_.joinable()) return;
    const uint64_t one = 1;
    KRAIT_CHECK(write(wake_.fd(), &one, sizeof one) == sizeof one);
    thread_.join();
  }

  // Any thread.
  void TellAll(const Notice& notice) const {
    for (const TcpPeer& peer : *peers_) {
      if (peer.watch.open()) peer.watch.Try(&notice, sizeof notice);
    }
  }
  int rank() const { return rank_; }

 private:
  void Run() {
    std::vector<pollfd> fds = {{.fd = wake_.fd(), .events = POLLIN, .revents = 0}};
    std::vector<int> ranks = {-1};
    for (size_t r = 0; r < peers_->size(); ++r) {
      if (!(*peers_)[r].watch.open()) continue;
      fds.push_back({.fd = (*peers_)[r].watch.fd(), .events = POLLIN, .revents = 0});
      ranks.push_back(static_cast<int>(r));
    }
    for (;;) {
      if (poll(fds.data(), fds.size(), -1) < 0) continue;
      if (fds[0].revents != 0) return;
      // A notice says more than a connection that closes.
      int gone = -1;
      for (size_t i = 1; i < fds.size(); ++i) {
        if (fds[i].revents == 0) continue;
        Notice notice;
        const Socket& watch = (*peers_)[static_cast<size_t>(ranks[i])].watch;
        if (watch.ReceiveWithin(&notice, sizeof notice, 1)) End(notice);
        if (gone < 0) gone = ranks[i];
      }
      if (gone < 0) continue;
      const auto code = static_cast<int>(ExitCode::kCollective);
      if (speaks_) {
        std::fprintf(stderr,
                     "krait: rank %d is gone (its connection closed): all ranks end (exit code "
                     "%d)\n",
                     gone, code);
      }
      End({.code = code, .rank = gone});
    }
  }

  [[noreturn]] void End(const Notice& notice) const {
    if (rank_ == 0) TellAll(notice);
    _exit(notice.code);
  }

  const int rank_;
  const bool speaks_;  // about a death
  std::vector<TcpPeer>* const peers_;
  Socket wake_;
  std::thread thread_;
};

std::atomic<Watch*> g_watch = nullptr;

// Ends all ranks, from any thread at any time.
void AbortAll(ExitCode code) {
  ExitWithin(kAbortSeconds, code);
  const Watch* const watch = g_watch;
  if (watch != nullptr) {
    std::fprintf(stderr, "krait: rank %d ends all ranks (exit code %d)\n", watch->rank(),
                 static_cast<int>(code));
    watch->TellAll({.code = static_cast<int32_t>(code), .rank = watch->rank()});
  }
  _exit(static_cast<int>(code));
}

class TcpWorld : public World {
 public:
  TcpWorld(const TcpJob& job, int local_rank, int local_size, int machine, bool speaks,
           TcpMeeting meeting, std::unique_ptr<Watchdog> watchdog)
      : World(job.rank, job.ranks, local_rank, local_size, machine),
        watchdog_(std::move(watchdog)),
        peers_(std::move(meeting.peers)),
        watch_(job.rank, speaks, &peers_) {
    g_watch = &watch_;
    SetFatalHook(AbortAll);
  }

  // Rank 0 leaves last: nobody takes the end of a connection for a death.
  ~TcpWorld() override {
    const LongPhase phase;
    CollectiveScope scope("end of the job", Shape(0, 0));
    ++number_;
    if (first()) {
      for (int r = 1; r < size(); ++r) Receive(r, Kind::kBye, &scope);
      watch_.Stop();
      for (int r = 1; r < size(); ++r) Send(r, Kind::kBye, {});
      char none = 0;
      for (int r = 1; r < size(); ++r) {
        (void)peers_[static_cast<size_t>(r)].messages.ReceiveWithin(&none, 1, kCloseSeconds);
      }
    } else {
      Send(0, Kind::kBye, {});
      Receive(0, Kind::kBye, &scope);
      watch_.Stop();
    }
    SetFatalHook(nullptr);
    g_watch = nullptr;
  }

  void SetHangTimeout(double seconds, const std::string& folder) override {
    watchdog_->Set(seconds, folder);
  }
  bool carries_tensors() const override { return false; }

  [[noreturn]] void Abort(ExitCode code) override {
    AbortAll(code);
    std::abort();
  }

  std::vector<std::string> AllGather(std::string_view mine) override {
    return Gather("gather of texts", Kind::kText, mine);
  }

  std::vector<int64_t> AllGather(int64_t mine) override {
    const std::string_view bytes(reinterpret_cast<const char*>(&mine), sizeof mine);
    std::vector<int64_t> all;
    for (const std::string& part : Gather("gather of numbers", Kind::kNumber, bytes)) {
      KRAIT_CHECK(part.size() == sizeof mine);
      std::memcpy(&all.emplace_back(), part.data(), sizeof mine);
    }
    return all;
  }

  std::string Broadcast(std::string_view bytes) override {
    CollectiveScope scope("broadcast", Shape(first() ? bytes.size() : 0, 0));
    ++number_;
    if (!first()) return Receive(0, Kind::kBroadcast, &scope);
    for (int r = 1; r < size(); ++r) Send(r, Kind::kBroadcast, bytes);
    return std::string(bytes);
  }

 private:
  CollectiveShape Shape(size_t sent, size_t received) const {
    return {.last_rank = size() - 1,
            .ranks = size(),
            .bytes_sent = static_cast<int64_t>(sent),
            .bytes_received = static_cast<int64_t>(received)};
  }

  // To rank 0, which sends all parts to all: for each its bytes, then all of them.
  std::vector<std::string> Gather(const char* what, Kind kind, std::string_view mine) {
    CollectiveScope scope(what, Shape(mine.size(), 0));
    ++number_;
    const auto ranks = static_cast<size_t>(size());
    std::vector<std::string> all(ranks);
    if (first()) {
      all[0] = std::string(mine);
      for (int r = 1; r < size(); ++r) all[static_cast<size_t>(r)] = Receive(r, kind, &scope);
      std::string packed(ranks * sizeof(uint64_t), '\0');
      for (size_t r = 0; r < ranks; ++r) {
        const uint64_t bytes = all[r].size();
        std::memcpy(packed.data() + r * sizeof bytes, &bytes, sizeof bytes);
      }
      for (const std::string& part : all) packed += part;
      for (int r = 1; r < size(); ++r) Send(r, kind, packed);
      return all;
    }
    Send(0, kind, mine);
    const std::string packed = Receive(0, kind, &scope);
    KRAIT_CHECK(packed.size() >= ranks * sizeof(uint64_t));
    size_t at = ranks * sizeof(uint64_t);
    for (size_t r = 0; r < ranks; ++r) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, packed.data() + r * sizeof bytes, sizeof bytes);
      KRAIT_CHECK(bytes <= packed.size() - at);
      all[r] = packed.substr(at, bytes);
      at += bytes;
    }
    return all;
  }

  void Send(int rank, Kind kind, std::string_view bytes) {
    const Header header = {.bytes = bytes.size(), .number = number_, .kind = kind};
    const Socket& socket = peers_[static_cast<size_t>(rank)].messages;
    if (!socket.Send(&header, sizeof header) || !socket.Send(bytes.data(), bytes.size())) {
      Lost(rank);
    }
  }

  std::string Receive(int rank, Kind kind, CollectiveScope* scope) {
    scope->WaitsFor(rank);
    const Header header = ReceiveHeader(rank, kind);
    std::string bytes(header.bytes, '\0');
    if (!peers_[static_cast<size_t>(rank)].messages.Receive(bytes.data(), bytes.size())) Lost(rank);
    return bytes;
  }

  Header ReceiveHeader(int rank, Kind kind) {
    Header header;
    if (!peers_[static_cast<size_t>(rank)].messages.Receive(&header, sizeof header)) Lost(rank);
    if (header.number != number_ || header.kind != kind) {
      KRAIT_FATAL("rank " + std::to_string(rank) + " is at message " +
                  std::to_string(header.number) + " of kind " +
                  std::to_string(static_cast<int>(header.kind)) + ", this one at " +
                  std::to_string(number_) + " of kind " + std::to_string(static_cast<int>(kind)));
    }
    return header;
  }

  // The watch ends this process, with the cause; it is the one who knows.
  [[noreturn]] static void Lost(int rank) {
    std::this_thread::sleep_for(std::chrono::seconds(kCauseSeconds));
    Fatal(ExitCode::kCollective, __FILE__, __LINE__,
          "the connection to rank " + std::to_string(rank) + " is gone");
  }

  // Between rank 0 and others alone. Rank 0 receives before it sends, the others the other way
  // round.
  void Transfer(const std::vector<Message>& sends, const std::vector<Message>& receives,
                const std::function<void(int)>& waits_for) override {
    ++number_;
    const auto receive = [&] {
      for (const Message& message : receives) {
        CheckPartner(message.rank);
        waits_for(message.rank);
        const Header header = ReceiveHeader(message.rank, Kind::kMessage);
        KRAIT_CHECK(header.bytes == static_cast<uint64_t>(message.bytes));
        const Socket& socket = peers_[static_cast<size_t>(message.rank)].messages;
        if (!socket.Receive(message.data, header.bytes)) Lost(message.rank);
      }
    };
    if (first()) receive();
    for (const Message& message : sends) {
      CheckPartner(message.rank);
      Send(message.rank, Kind::kMessage,
           {static_cast<const char*>(message.data), static_cast<size_t>(message.bytes)});
    }
    if (!first()) receive();
  }

  void CheckPartner(int other) const {
    if ((first() || other == 0) && other != rank() && other >= 0 && other < size()) return;
    KRAIT_FATAL("a message between ranks " + std::to_string(rank()) + " and " +
                std::to_string(other) + ", which needs MPI");
  }

  std::unique_ptr<Watchdog> watchdog_;
  std::vector<TcpPeer> peers_;
  Watch watch_;
  uint32_t number_ = 0;  // of operations so far
};

// A whole number of an environment variable; `fallback` where it is not set.
absl::StatusOr<int> Number(const char* name, int least, int most, int fallback) {
  const char* const text = std::getenv(name);
  if (text == nullptr) return fallback;
  int value = 0;
  const char* const end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < least || value > most) {
    return Error(ExitCode::kConfig, std::string(name) + " is \"" + text + "\"; a number from " +
                                        std::to_string(least) + " to " + std::to_string(most) +
                                        " is needed");
  }
  return value;
}

}  // namespace

std::string FirstNode(const std::string& list) {
  std::string name;
  for (size_t i = 0; i < list.size() && list[i] != ','; ++i) {
    if (list[i] != '[') {
      name += list[i];
      continue;
    }
    const size_t end = std::min(list.find(']', i), list.size());
    name += list.substr(i + 1, std::min(list.find_first_of("-,", i), end) - i - 1);
    i = end;
  }
  return name;
}

absl::StatusOr<TcpJob> TcpJobOfThisProcess(const Launch& launch, int argc,
                                           const char* const* argv) {
  const auto variable = [](const char* name) -> std::string {
    const char* const value = std::getenv(name);
    return value != nullptr ? value : "";
  };
  constexpr int kMaxPort = 65535, kMaxRanks = 1 << 20;
  const bool slurm = launch.launcher == "srun";
  TcpJob job;
  ErrorList errors;
  const auto number = [&](const char* name, int least, int most, int fallback) {
    const auto value = Number(name, least, most, fallback);
    errors.Add(value.status());
    return value.ok() ? *value : fallback;
  };
  job.ranks = number(slurm ? "SLURM_STEP_NUM_TASKS" : "WORLD_SIZE", 2, kMaxRanks, 2);
  job.rank = number(slurm ? "SLURM_PROCID" : "RANK", 0, job.ranks - 1, 0);
  job.local_rank = number(slurm ? "SLURM_LOCALID" : "LOCAL_RANK", 0, kMaxRanks, -1);
  job.local_size = number("LOCAL_WORLD_SIZE", 1, kMaxRanks, -1);
  job.address = variable("MASTER_ADDR");
  int port = -1;
  if (slurm) {
    const std::string nodes = variable("SLURM_STEP_NODELIST");
    if (job.address.empty()) job.address = FirstNode(nodes);
    // Steps of a job, and jobs of a node, have different ones; so has the range that systems give
    // to whoever asks.
    const auto id = std::strtoull(variable("SLURM_JOB_ID").c_str(), nullptr, 10);
    const auto step = std::strtoull(variable("SLURM_STEP_ID").c_str(), nullptr, 10);
    port = 15000 + static_cast<int>((id * 7 + step) % 15000);
  }
  job.port = number("MASTER_PORT", 1, kMaxPort - 1, port);
  if (job.address.empty()) {
    errors.Add(ExitCode::kConfig,
               "MASTER_ADDR is not set: where rank 0 is, for the " + std::to_string(job.ranks) +
                   " ranks of WORLD_SIZE (unset RANK and WORLD_SIZE for a single process)");
  }
  if (job.port < 0 && variable("MASTER_PORT").empty()) {
    errors.Add(ExitCode::kConfig, "MASTER_PORT is not set: the port where rank 0 listens");
  }
  // Of these each rank would say the same.
  if (!errors.empty()) {
    return Error(ExitCode::kConfig,
                 launch.rank > 0 && launch.rank < job.ranks ? "" : MessageOf(errors.ToStatus()));
  }
  if (variable("TORCHELASTIC_USE_AGENT_STORE") == "True") ++job.port;
  std::string words = std::to_string(job.ranks);
  for (const char* name : {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID",
                           "SLURM_STEP_ID", "SLURM_RESTART_COUNT"}) {
    words += '\0' + variable(name);
  }
  for (int i = 1; i < argc; ++i) words += '\0' + std::string(argv[i]);
  job.key = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : words) job.key = (job.key ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return job;
}

absl::StatusOr<std::unique_ptr<World>> StartTcpWorld(const TcpJob& job) {
  auto watchdog = std::make_unique<Watchdog>(job.rank, kHangSeconds, ".");
  auto scope = std::make_unique<CollectiveScope>(
      "meeting of the ranks", CollectiveShape{.last_rank = job.ranks - 1, .ranks = job.ranks});
  KRAIT_ASSIGN_OR_RETURN(TcpMeeting meeting, Meet(job));
  scope.reset();
  int local_rank = 0, local_size = 0, machine = -1, speaker = -1;
  const auto self = static_cast<size_t>(job.rank);
  for (size_t r = 0; r < meeting.hosts.size(); ++r) {
    if (meeting.hosts[r] != meeting.hosts[self]) continue;
    ++local_size;
    if (machine < 0) machine = static_cast<int>(r);
    if (r < self) ++local_rank;
    // Of rank 0's death one of each machine speaks, of all others' rank 0.
    if (r > 0 && speaker < 0) speaker = static_cast<int>(r);
  }
  if (job.local_rank >= 0) local_rank = job.local_rank;
  if (job.local_size > 0) local_size = job.local_size;
  const bool speaks = job.rank == 0 || job.rank == speaker;
  return std::make_unique<TcpWorld>(job, local_rank, local_size, machine, speaks,
                                    std::move(meeting), std::move(watchdog));
}

}  // namespace krait
