// Sockets of the star (tcp.h).
#ifndef KRAIT_PARALLEL_TCP_SOCKET_H_
#define KRAIT_PARALLEL_TCP_SOCKET_H_

#include <cstddef>
#include <string>
#include <utility>

#include "kernels/base/status.h"

namespace krait {

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    Close();
    fd_ = std::exchange(other.fd_, -1);
    return *this;
  }
  ~Socket() { Close(); }

  int fd() const { return fd_; }
  bool open() const { return fd_ >= 0; }
  void Close();

  // All of it, waiting as long as it takes; false when the connection is gone.
  bool Send(const void* data, size_t size) const;
  bool Receive(void* data, size_t size) const;
  // The same, but it gives up after so many seconds without a byte.
  bool ReceiveWithin(void* data, size_t size, double seconds) const;
  // Sends at once and without waiting, or not.
  void Try(const void* data, size_t size) const;
  // What arrived, at most `size` bytes, without waiting: 0 nothing yet, -1 the connection is gone.
  ptrdiff_t Take(void* data, size_t size) const;
  // Whether the other end is gone; what it sent before may still be read.
  bool HungUp() const;

 private:
  int fd_ = -1;
};

// Listens at the port: of this machine alone where `address` is one of its own loop, else of all
// networks. kConfig when it cannot.
absl::StatusOr<Socket> Listen(const std::string& address, int port);
// The next caller; not open when there is none.
Socket Accept(const Socket& listener);
// One attempt of at most `seconds`; not open when it fails, for `*reason`.
Socket Connect(const std::string& address, int port, double seconds, std::string* reason);

}  // namespace krait

#endif  // KRAIT_PARALLEL_TCP_SOCKET_H_
