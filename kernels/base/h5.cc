// What reading and writing share: handles, types, and the life of a file.
#include "kernels/base/h5.h"

#include <hdf5.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/h5_internal.h"

#ifdef KRAIT_SANITIZE
// HDF5 forgets memory when it gives up on a damaged file; abandoned files are left on purpose.
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5\n"; }
#endif

namespace krait {
namespace h5 {
namespace {

std::mutex& Mutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

Session::Session() : lock_(Mutex()) {
  static const bool initialised = [] {
    // HDF5 must not flush an abandoned file at exit; complete files are closed long before.
    H5dont_atexit();
    H5open();
    H5PLset_loading_state(0);  // no filter plug-ins from the file system
    return true;
  }();
  KRAIT_CHECK(initialised);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

std::string Reason() {
  std::string reason;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
        auto* text = static_cast<std::string*>(out);
        if (text->empty() && error->desc != nullptr) *text = error->desc;
        return 0;
      },
      &reason);
  constexpr char kMark[] = "error message = '";
  if (const size_t mark = reason.find(kMark); mark != std::string::npos) {
    const size_t begin = mark + std::strlen(kMark);
    reason = reason.substr(begin, reason.find('\'', begin) - begin);
  }
  return reason.empty() ? "HDF5 gives no reason" : reason;
}

Handle TypeOf(DType dtype) {
  hid_t id = H5I_INVALID_HID;
  switch (dtype) {
    case DType::kF32:
      id = H5Tcopy(H5T_IEEE_F32LE);
      break;
    case DType::kBF16:
      // A float with the upper half of its mantissa: sign 15, exponent 7..14, mantissa 0..6.
      id = H5Tcopy(H5T_IEEE_F32LE);
      if (id >= 0 && (H5Tset_fields(id, 15, 7, 8, 0, 7) < 0 || H5Tset_precision(id, 16) < 0 ||
                      H5Tset_size(id, 2) < 0 || H5Tset_ebias(id, 127) < 0)) {
        H5Tclose(id);
        id = H5I_INVALID_HID;
      }
      break;
    case DType::kF64:
      id = H5Tcopy(H5T_IEEE_F64LE);
      break;
    case DType::kI32:
      id = H5Tcopy(H5T_STD_I32LE);
      break;
    case DType::kI64:
      id = H5Tcopy(H5T_STD_I64LE);
      break;
    case DType::kU8:
      id = H5Tcopy(H5T_STD_U8LE);
      break;
    case DType::kU16:
      id = H5Tcopy(H5T_STD_U16LE);
      break;
    case DType::kU32:
      id = H5Tcopy(H5T_STD_U32LE);
      break;
    case DType::kU64:
      id = H5Tcopy(H5T_STD_U64LE);
      break;
  }
  return Handle(id, H5Tclose);
}

std::vector<std::string> Prefixes(std::string_view name) {
  std::vector<std::string> prefixes;
  std::string path;
  while (!name.empty()) {
    const size_t slash = name.find('/');
    const std::string_view part = name.substr(0, slash);
    if (!part.empty()) {
      path += '/';
      path += part;
      prefixes.push_back(path);
    }
    name = slash == std::string_view::npos ? std::string_view() : name.substr(slash + 1);
  }
  return prefixes;
}

}  // namespace h5

void H5File::State::Abandon(const std::string& path) {
  failed = true;
  for (auto& entry : datasets) entry.second.handle.Release();
  file.Release();
  // Returns the space at once, even while the descriptor stays open. Nothing is left to save.
  if (truncate(path.c_str(), 0) != 0) return;
}

H5File::H5File() = default;
H5File::H5File(H5File&& other) noexcept = default;

H5File& H5File::operator=(H5File&& other) noexcept {
  if (this != &other) {
    (void)Close();
    state_ = std::move(other.state_);
    path_ = std::move(other.path_);
    code_ = other.code_;
  }
  return *this;
}

H5File::~H5File() { (void)Close(); }

absl::Status H5File::Fail(const std::string& what) const {
  const absl::Status status = Error(code_, path_ + ": " + what + ": " + h5::Reason());
  if (state_ != nullptr && state_->writing) state_->Abandon(path_);
  return status;
}

absl::Status H5File::Close() {
  if (state_ == nullptr) return absl::OkStatus();
  const h5::Session session;
  const std::unique_ptr<State> state = std::move(state_);
  if (state->failed) return Error(code_, path_ + ": an earlier write failed");
  const char* failed = nullptr;
  for (auto& entry : state->datasets) {
    if (!entry.second.handle.Close()) failed = "cannot complete a dataset";
    if (failed != nullptr && state->writing) break;
  }
  if (failed == nullptr && state->writing && H5Fflush(state->file.get(), H5F_SCOPE_LOCAL) < 0) {
    failed = "cannot write";
  }
  if (failed == nullptr && !state->file.Close()) failed = "cannot close";
  if (failed == nullptr) return absl::OkStatus();
  const absl::Status status = Error(code_, path_ + ": " + failed + ": " + h5::Reason());
  if (state->writing) state->Abandon(path_);
  return status;
}

}  // namespace krait
