#include "parallel/tcp_meeting.h"

#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

#include "kernels/base/clock.h"
#include "kernels/base/file.h"

namespace krait {
namespace {

constexpr std::array<char, 8> kHelloMagic = {'k', 'r', 'a', 'i', 't', ' ', 'h', '1'};
constexpr std::array<char, 8> kAnswerMagic = {'k', 'r', 'a', 'i', 't', ' ', 'a', '1'};
constexpr double kHelloSeconds = 10;  // for a caller to say who it is
constexpr double kPortSeconds = 8;    // for the port to become free: a job that is just ending
constexpr double kSilentSeconds = 5;  // before rank 0 says whom it waits for
constexpr double kGraceSeconds = 10;  // of the others for rank 0's word, after their own limit
constexpr size_t kMaxStrangers = 256;
enum Channel : int32_t { kMessages, kWatch };

// What a caller sends first.
struct Hello {
  std::array<char, 8> magic = kHelloMagic;
  uint64_t key = 0;
  int32_t rank = 0, ranks = 0;
  int32_t channel = kMessages, unused = 0;
  std::array<char, 128> host = {};
};
// What it gets: that it is welcome; then on the channel of messages that all are there (and the
// hosts follow), or an exit code (and the reason follows).
constexpr int32_t kWelcome = -1, kGo = 0;
struct Answer {
  std::array<char, 8> magic = kAnswerMagic;
  int32_t code = kWelcome, bytes = 0;
};

// The same for ranks of one machine, or one container of it.
std::array<char, 128> HostName() {
  std::array<char, 128> name = {};
  (void)gethostname(name.data(), 64);
  const auto boot = ReadFile("/proc/sys/kernel/random/boot_id", 64, ExitCode::kInternal);
  const size_t used = std::strlen(name.data());
  if (boot.ok()) std::memcpy(name.data() + used, boot->data(), std::min<size_t>(boot->size(), 60));
  return name;
}

std::string Place(const TcpJob& job) { return job.address + ":" + std::to_string(job.port); }

std::string Seconds(double seconds) { return std::to_string(static_cast<int64_t>(seconds)) + " s"; }

void Say(const Socket& socket, int32_t code, const std::string& text) {
  const Answer answer = {.code = code, .bytes = static_cast<int32_t>(text.size())};
  std::string all(reinterpret_cast<const char*>(&answer), sizeof answer);
  all += text;
  if (code == kGo) {
    (void)socket.Send(all.data(), all.size());  // who is gone is found out by the watch
  } else {
    socket.Try(all.data(), all.size());
  }
}

// Rank 0's part.
class Host {
 public:
  explicit Host(const TcpJob& job) : job_(job) {
    meeting_.peers.resize(static_cast<size_t>(job.ranks));
    meeting_.hosts.resize(static_cast<size_t>(job.ranks));
    meeting_.hosts[0] = std::string(HostName().data());
  }

  absl::StatusOr<TcpMeeting> Run() {
    const double begin = MonotonicSeconds();
    auto listener = Listen(job_.address, job_.port);
    while (!listener.ok() && MonotonicSeconds() < begin + kPortSeconds) {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      listener = Listen(job_.address, job_.port);
    }
    if (!listener.ok()) {
      return Error(ExitCode::kConfig,
                   "rank 0 cannot listen at " + Place(job_) + ": " + MessageOf(listener.status()) +
                       "; another job may use MASTER_PORT, give this one its own");
    }
    bool said = false;
    while (!AllThere()) {
      if (MonotonicSeconds() > begin + job_.start_seconds) {
        return Failed("after " + Seconds(job_.start_seconds) + " at " + Place(job_) + " " +
                      Missing() + (refused_.empty() ? "" : "; refused was " + refused_));
      }
      // Most often a process that somebody started by hand where a launcher set its variables.
      if (!said && MonotonicSeconds() > begin + kSilentSeconds) {
        std::fprintf(stderr, "krait: waiting for the others at %s for %s: %s%s\n",
                     Place(job_).c_str(), Seconds(job_.start_seconds).c_str(), Missing().c_str(),
                     std::getenv("WORLD_SIZE") != nullptr
                         ? " (unset RANK and WORLD_SIZE for a single process)"
                         : "");
        said = true;
      }
      Wait(*listener);
      while (TakeCaller(*listener)) continue;
      for (Caller& caller : callers_) Hear(&caller);
      std::erase_if(callers_, [](const Caller& caller) { return !caller.socket.open(); });
      for (int rank = 1; rank < job_.ranks; ++rank) {
        const TcpPeer& peer = meeting_.peers[static_cast<size_t>(rank)];
        for (const Socket* socket : {&peer.messages, &peer.watch}) {
          if (socket->open() && socket->HungUp()) {
            return Failed("rank " + std::to_string(rank) + " of " + std::to_string(job_.ranks) +
                          " was there and is gone: its connection closed before all had met");
          }
        }
      }
    }
    std::string hosts;
    for (const std::string& host : meeting_.hosts) hosts += host + '\n';
    for (const TcpPeer& peer : meeting_.peers) {
      if (peer.messages.open()) Say(peer.messages, kGo, hosts);
    }
    return std::move(meeting_);
  }

 private:
  // Somebody who has not said who it is.
  struct Caller {
    Socket socket;
    double since = 0;
    size_t heard = 0;
    std::array<char, sizeof(Hello)> bytes;
  };

  bool AllThere() const {
    return std::all_of(meeting_.peers.begin() + 1, meeting_.peers.end(), [](const TcpPeer& peer) {
      return peer.messages.open() && peer.watch.open();
    });
  }

  // For something to happen, or a moment.
  void Wait(const Socket& listener) const {
    std::vector<pollfd> fds = {{.fd = listener.fd(), .events = POLLIN, .revents = 0}};
    for (const Caller& caller : callers_) {
      fds.push_back({.fd = caller.socket.fd(), .events = POLLIN, .revents = 0});
    }
    (void)poll(fds.data(), fds.size(), 100);
  }

  bool TakeCaller(const Socket& listener) {
    Socket socket = Accept(listener);
    if (!socket.open()) return false;
    // A crowd of strangers does not keep ranks out.
    if (callers_.size() >= kMaxStrangers + 2 * meeting_.peers.size()) {
      callers_.erase(callers_.begin());
    }
    callers_.push_back({.socket = std::move(socket), .since = MonotonicSeconds(), .bytes = {}});
    return true;
  }

  void Hear(Caller* caller) {
    const ptrdiff_t n = caller->socket.Take(caller->bytes.data() + caller->heard,
                                            caller->bytes.size() - caller->heard);
    if (n > 0) caller->heard += static_cast<size_t>(n);
    const size_t magic = std::min(caller->heard, kHelloMagic.size());
    const bool stranger = std::memcmp(caller->bytes.data(), kHelloMagic.data(), magic) != 0;
    if (n < 0 || stranger || MonotonicSeconds() > caller->since + kHelloSeconds) {
      caller->socket.Close();
    } else if (caller->heard == caller->bytes.size()) {
      Hello hello;
      std::memcpy(&hello, caller->bytes.data(), sizeof hello);
      Admit(hello, std::move(caller->socket));
    }
  }

  void Admit(const Hello& hello, Socket socket) {
    const std::string who = "rank " + std::to_string(hello.rank);
    std::string fault;
    if (hello.key != job_.key || hello.ranks != job_.ranks) {
      fault =
          "rank 0 at " + Place(job_) + " is of another job, of " + std::to_string(job_.ranks) +
          " ranks or with another command line: give each job a MASTER_PORT of its own, and all "
          "of its ranks the same words";
    } else if (hello.rank < 1 || hello.rank >= job_.ranks ||
               (hello.channel != kMessages && hello.channel != kWatch)) {
      fault = "there is no " + who + " of " + std::to_string(job_.ranks);
    }
    if (fault.empty()) {
      TcpPeer& peer = meeting_.peers[static_cast<size_t>(hello.rank)];
      Socket& slot = hello.channel == kMessages ? peer.messages : peer.watch;
      if (!slot.open()) {
        const auto end = std::find(hello.host.begin(), hello.host.end(), '\0');
        meeting_.hosts[static_cast<size_t>(hello.rank)] = std::string(hello.host.begin(), end);
        Say(socket, kWelcome, "");
        slot = std::move(socket);
        return;
      }
      fault = who + " is at " + Place(job_) +
              " already: two processes have the same RANK, or another "
              "job with the same words uses this MASTER_PORT";
    }
    refused_ = who + ": " + fault;
    Say(socket, static_cast<int32_t>(ExitCode::kConfig), fault);
  }

  // Ends the meeting for all who are there.
  absl::Status Failed(const std::string& why) {
    for (const TcpPeer& peer : meeting_.peers) {
      if (peer.messages.open()) Say(peer.messages, static_cast<int32_t>(ExitCode::kCollective), "");
    }
    return Error(ExitCode::kCollective, why);
  }

  std::string Missing() const {
    std::string missing;
    int count = 0;
    for (int rank = 1; rank < job_.ranks; ++rank) {
      const TcpPeer& peer = meeting_.peers[static_cast<size_t>(rank)];
      if (peer.messages.open() && peer.watch.open()) continue;
      if (++count <= 10) missing += (count > 1 ? ", " : "") + std::to_string(rank);
    }
    if (count > 10) missing += ", ...";
    return std::to_string(count) + " of " + std::to_string(job_.ranks) +
           " ranks are missing (rank " + missing + ")";
  }

  const TcpJob& job_;
  TcpMeeting meeting_;
  std::vector<Caller> callers_;
  std::string refused_;  // the last one
};

// The part of the others.
class Guest {
 public:
  explicit Guest(const TcpJob& job)
      : job_(job), who_("rank " + std::to_string(job.rank) + ": "), begin_(MonotonicSeconds()) {}

  absl::StatusOr<TcpMeeting> Run() {
    TcpMeeting meeting;
    meeting.peers.resize(1);
    TcpPeer& first = meeting.peers[0];
    KRAIT_RETURN_IF_ERROR(Call(kMessages, &first.messages));
    KRAIT_RETURN_IF_ERROR(Call(kWatch, &first.watch));
    Answer answer;
    const double left = begin_ + job_.start_seconds + kGraceSeconds - MonotonicSeconds();
    std::string text;
    if (!Read(first.messages, left, &answer, &text)) {
      return Error(ExitCode::kCollective, who_ + "rank 0 at " + Place(job_) +
                                              " is gone: its connection closed before all had met");
    }
    if (answer.code != kGo) return Refusal(answer.code, text);
    for (size_t at = 0, end; at < text.size(); at = end + 1) {
      end = std::min(text.find('\n', at), text.size());
      meeting.hosts.push_back(text.substr(at, end - at));
    }
    if (meeting.hosts.size() != static_cast<size_t>(job_.ranks)) {
      return Error(ExitCode::kCollective, who_ + "rank 0 names the machines of " +
                                              std::to_string(meeting.hosts.size()) + " ranks");
    }
    return meeting;
  }

 private:
  // An answer and its text, or false when the connection closes or is somebody else's.
  static bool Read(const Socket& socket, double seconds, Answer* answer, std::string* text) {
    constexpr int32_t kMaxBytes = 64 << 20;
    if (!socket.ReceiveWithin(answer, sizeof *answer, seconds)) return false;
    if (answer->magic != kAnswerMagic || answer->bytes < 0 || answer->bytes > kMaxBytes)
      return false;
    text->resize(static_cast<size_t>(answer->bytes));
    return socket.ReceiveWithin(text->data(), text->size(), kHelloSeconds);
  }

  absl::Status Refusal(int32_t code, const std::string& text) const {
    // Without a text the first rank says it.
    return Error(static_cast<ExitCode>(code), text.empty() ? "" : who_ + text);
  }

  // Until it is welcome.
  absl::Status Call(Channel channel, Socket* result) {
    Hello hello = {.key = job_.key,
                   .rank = job_.rank,
                   .ranks = job_.ranks,
                   .channel = channel,
                   .host = HostName()};
    std::string reason;
    while (MonotonicSeconds() < begin_ + job_.start_seconds) {
      Socket socket = Connect(job_.address, job_.port, kHelloSeconds, &reason);
      Answer answer;
      std::string text;
      if (socket.open()) {
        if (socket.Send(&hello, sizeof hello) && Read(socket, kHelloSeconds, &answer, &text)) {
          if (answer.code != kWelcome) return Refusal(answer.code, text);
          *result = std::move(socket);
          return absl::OkStatus();
        }
        reason = "who answers there is no rank of krait";
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    return Error(ExitCode::kCollective, who_ + "no rank 0 at " + Place(job_) + " within " +
                                            Seconds(job_.start_seconds) + ": " + reason);
  }

  const TcpJob& job_;
  const std::string who_;
  const double begin_;
};

}  // namespace

absl::StatusOr<TcpMeeting> Meet(const TcpJob& job) {
  if (job.rank != 0) return Guest(job).Run();
  // Two connections to each rank.
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    const auto needed = static_cast<rlim_t>(2 * job.ranks) + 1024;
    limit.rlim_cur = std::max(limit.rlim_cur, std::min(needed, limit.rlim_max));
    (void)setrlimit(RLIMIT_NOFILE, &limit);
  }
  return Host(job).Run();
}

}  // namespace krait
