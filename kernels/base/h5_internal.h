// What the files h5*.cc share. The only header that names HDF5's own types.
#ifndef KRAIT_KERNELS_BASE_H5_INTERNAL_H_
#define KRAIT_KERNELS_BASE_H5_INTERNAL_H_

#include <hdf5.h>

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/base/file.h"
#include "kernels/base/h5.h"

namespace krait {
namespace h5 {

// Every use of HDF5 happens inside a Session: one thread at a time, and no error stack on stderr
// (the thread-safe build keeps that setting per thread).
class Session {
 public:
  Session();

 private:
  std::lock_guard<std::mutex> lock_;
};

// An HDF5 identifier, closed by `close` (H5Dclose, ...).
class Handle {
 public:
  using Closer = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Closer close) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(other.Release()), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    Close();
    id_ = other.Release();
    close_ = other.close_;
    return *this;
  }
  ~Handle() { Close(); }

  hid_t get() const { return id_; }
  bool ok() const { return id_ >= 0; }
  bool Close() {
    const hid_t id = Release();
    return id < 0 || close_(id) >= 0;
  }
  hid_t Release() { return std::exchange(id_, H5I_INVALID_HID); }

 private:
  hid_t id_ = H5I_INVALID_HID;
  Closer close_ = nullptr;
};

// HDF5's innermost reason for the last failure of this thread; of a failed system call only the
// system's words, which the description quotes as "error message = '...'".
std::string Reason();

// The type in the file, which is also the type in memory: HDF5 converts nothing (its own
// conversion would change the payload of NaNs).
Handle TypeOf(DType dtype);

// Splits "/a/b/c" into "/a", "/a/b", "/a/b/c".
std::vector<std::string> Prefixes(std::string_view name);

}  // namespace h5

struct H5File::Dataset {
  h5::Handle handle;
  DType dtype;
  uint64_t elements;
};

struct H5File::Attribute {
  h5::Handle handle, type;
  int64_t values = 0;  // 1 for a scalar
};

struct H5File::State {
  h5::Handle file;
  std::map<std::string, Dataset, std::less<>> datasets;  // the ones in use
  bool writing = false;
  bool failed = false;
  File raw;  // when reading, and its size then
  int64_t file_bytes = 0;

  // Leaves every identifier open for the rest of the process: a close would write. The file keeps
  // its descriptor and so its inode, which HDF5 would otherwise confuse with a later file's.
  void Abandon(const std::string& path);
};

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_H5_INTERNAL_H_
