#include "parallel/tcp_socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "kernels/base/clock.h"

namespace krait {
namespace {

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

Addresses Resolve(const char* address, int port, int flags, std::string* reason) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(address, std::to_string(port).c_str(), &hints, &found);
  if (error != 0) {
    *reason = gai_strerror(error);
    found = nullptr;
  }
  return {found, &freeaddrinfo};
}

bool IsLoop(const addrinfo& address) {
  if (address.ai_family == AF_INET) {
    const auto* in = reinterpret_cast<const sockaddr_in*>(address.ai_addr);
    return ntohl(in->sin_addr.s_addr) >> 24 == 127;
  }
  const auto* in = reinterpret_cast<const sockaddr_in6*>(address.ai_addr);
  return address.ai_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&in->sin6_addr);
}

// Small messages at once, and a machine that is gone without a word noticed within a minute.
void Prepare(int fd) {
  const auto set = [fd](int level, int name, int value) {
    (void)setsockopt(fd, level, name, &value, sizeof value);
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 15);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(IPPROTO_TCP, TCP_KEEPCNT, 6);
}

// Whether one of `events` comes within `seconds`.
bool WaitFor(int fd, short events, double seconds) {
  const double until = MonotonicSeconds() + seconds;
  for (;;) {
    pollfd one = {.fd = fd, .events = events, .revents = 0};
    const double left = std::max(0.0, until - MonotonicSeconds());
    const int ready = poll(&one, 1, static_cast<int>(left * 1000) + 1);
    if (ready > 0) return true;
    if (ready == 0 && MonotonicSeconds() >= until) return false;
    if (ready < 0 && errno != EINTR) return false;
  }
}

}  // namespace

void Socket::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

bool Socket::Send(const void* data, size_t size) const {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = send(fd_, next, size, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    next += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

bool Socket::Receive(void* data, size_t size) const {
  char* next = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t n = recv(fd_, next, size, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    next += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

bool Socket::ReceiveWithin(void* data, size_t size, double seconds) const {
  char* next = static_cast<char*>(data);
  while (size > 0) {
    if (!WaitFor(fd_, POLLIN, seconds)) return false;
    const ptrdiff_t n = Take(next, size);
    if (n < 0) return false;
    next += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

void Socket::Try(const void* data, size_t size) const {
  (void)!send(fd_, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ptrdiff_t Socket::Take(void* data, size_t size) const {
  const ssize_t n = recv(fd_, data, size, MSG_DONTWAIT);
  if (n > 0) return n;
  return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) ? 0 : -1;
}

bool Socket::HungUp() const {
  pollfd one = {.fd = fd_, .events = POLLRDHUP, .revents = 0};
  return poll(&one, 1, 0) > 0 && (one.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

absl::StatusOr<Socket> Listen(const std::string& address, int port) {
  std::string reason;
  const Addresses own = Resolve(address.c_str(), port, 0, &reason);
  const bool loop = own != nullptr && IsLoop(*own);
  const Addresses any =
      loop ? Addresses(nullptr, &freeaddrinfo) : Resolve(nullptr, port, AI_PASSIVE, &reason);
  // IPv6 first, which takes IPv4 too; then IPv4 for machines without the former.
  for (const int family : {AF_INET6, AF_INET}) {
    for (const addrinfo* a = loop ? own.get() : any.get(); a != nullptr; a = a->ai_next) {
      if (a->ai_family != family || (loop && !IsLoop(*a))) continue;
      Socket socket(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
      const int on = 1, off = 0;
      if (!socket.open()) {
        reason = std::strerror(errno);
        continue;
      }
      (void)setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
      if (family == AF_INET6) {
        (void)setsockopt(socket.fd(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
      }
      if (bind(socket.fd(), a->ai_addr, a->ai_addrlen) == 0 &&
          listen(socket.fd(), SOMAXCONN) == 0) {
        return socket;
      }
      reason = std::strerror(errno);
      // Taken: the other family would be a part of the port only.
      if (errno == EADDRINUSE) return Error(ExitCode::kConfig, reason);
    }
  }
  return Error(ExitCode::kConfig, reason);
}

Socket Accept(const Socket& listener) {
  Socket caller(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
  if (caller.open()) Prepare(caller.fd());
  return caller;
}

Socket Connect(const std::string& address, int port, double seconds, std::string* reason) {
  const Addresses found = Resolve(address.c_str(), port, 0, reason);
  for (const addrinfo* a = found.get(); a != nullptr; a = a->ai_next) {
    Socket socket(::socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket.open()) {
      *reason = std::strerror(errno);
      continue;
    }
    // A limit for what is sent is one for connecting, too.
    const timeval limit = {.tv_sec = static_cast<time_t>(seconds) + 1, .tv_usec = 0};
    const timeval none = {};
    (void)setsockopt(socket.fd(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (connect(socket.fd(), a->ai_addr, a->ai_addrlen) != 0) {
      *reason = errno == EINPROGRESS ? "no answer" : std::strerror(errno);
      continue;
    }
    (void)setsockopt(socket.fd(), SOL_SOCKET, SO_SNDTIMEO, &none, sizeof none);
    Prepare(socket.fd());
    return socket;
  }
  return Socket();
}

}  // namespace krait
