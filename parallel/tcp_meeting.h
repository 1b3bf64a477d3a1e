// How the ranks of the star find each other (tcp.h).
#ifndef KRAIT_PARALLEL_TCP_MEETING_H_
#define KRAIT_PARALLEL_TCP_MEETING_H_

#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "parallel/tcp.h"
#include "parallel/tcp_socket.h"

namespace krait {

// The two connections to another rank.
struct TcpPeer {
  Socket messages, watch;
};

struct TcpMeeting {
  std::vector<TcpPeer> peers;      // by rank: of rank 0 to all others, of the others to rank 0
  std::vector<std::string> hosts;  // the machine of each rank
};

absl::StatusOr<TcpMeeting> Meet(const TcpJob& job);

}  // namespace krait

#endif  // KRAIT_PARALLEL_TCP_MEETING_H_
