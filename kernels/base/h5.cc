#include "kernels/base/h5.h"

#include <hdf5.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/file.h"

#ifdef KRAIT_SANITIZE
// HDF5 forgets memory when it gives up on a damaged file; abandoned files are left on purpose.
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5\n"; }
#endif

namespace krait {
namespace {

constexpr hsize_t kAlignment = 4096;
constexpr hsize_t kMaxChunkBytes = hsize_t{64} << 20;
constexpr size_t kMaxStringAttribute = size_t{64} << 10;

// Every use of HDF5 happens inside a Session: one thread at a time, and no error stack on stderr
// (the thread-safe build keeps that setting per thread).
class Session {
 public:
  Session() : lock_(Mutex()) {
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

 private:
  static std::mutex& Mutex() {
    static std::mutex mutex;
    return mutex;
  }
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

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF64, DType::kI32, DType::kI64,
                             DType::kU8,  DType::kU16,  DType::kU32, DType::kU64};

// The type in the file, which is also the type in memory: HDF5 converts nothing (its own
// conversion would change the payload of NaNs).
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

// Splits "/a/b/c" into "/a", "/a/b", "/a/b/c".
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

Handle DatasetProperties() {
  Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  // Without times, equal content gives equal bytes.
  if (properties.ok() && H5Pset_obj_track_times(properties.get(), false) < 0) properties.Close();
  return properties;
}

// What is wrong with the storage of a dataset that is to be read; empty when nothing is.
std::string StorageFault(hid_t dataset, uint64_t bytes, size_t element_bytes, uint64_t elements) {
  const Handle properties(H5Dget_create_plist(dataset), H5Pclose);
  if (!properties.ok()) return Reason();
  const H5D_layout_t layout = H5Pget_layout(properties.get());
  if (layout != H5D_CONTIGUOUS && layout != H5D_CHUNKED) {
    return layout == H5D_VIRTUAL ? "virtual storage is not accepted"
                                 : "storage is neither contiguous nor chunked";
  }
  if (H5Pget_external_count(properties.get()) != 0) return "external storage is not accepted";
  const int filters = H5Pget_nfilters(properties.get());
  if (filters < 0) return Reason();
  for (int i = 0; i < filters; ++i) {
    unsigned flags = 0;
    size_t values = 0;
    char filter_name[64] = "";
    const H5Z_filter_t filter =
        H5Pget_filter2(properties.get(), static_cast<unsigned>(i), &flags, &values, nullptr,
                       sizeof(filter_name), filter_name, nullptr);
    if (filter != H5Z_FILTER_FLETCHER32) {
      return "filter " + std::to_string(filter) + " (" + std::string(filter_name) +
             ") is not accepted; only uncompressed data is";
    }
  }
  if (bytes == 0) return "";
  if (layout == H5D_CONTIGUOUS) {
    if (H5Dget_storage_size(dataset) != bytes || H5Dget_offset(dataset) == HADDR_UNDEF) {
      return "the data is not in the file";
    }
    return "";
  }
  hsize_t chunk = 0;
  if (H5Pget_chunk(properties.get(), 1, &chunk) != 1 || chunk == 0) return "bad chunk shape";
  if (chunk > kMaxChunkBytes / element_bytes) {
    return "chunks of " + std::to_string(chunk) + " elements are above 64 MiB";
  }
  hsize_t chunks = 0;
  const Handle space(H5Dget_space(dataset), H5Sclose);
  if (!space.ok() || H5Dget_num_chunks(dataset, space.get(), &chunks) < 0) return Reason();
  const uint64_t needed = (elements - 1) / chunk + 1;
  if (chunks != needed) {
    return std::to_string(chunks) + " chunks are stored where " + std::to_string(needed) +
           " are needed";
  }
  return "";
}

}  // namespace

struct H5File::Dataset {
  Handle handle;
  DType dtype;
  uint64_t elements;
};

struct H5File::Attribute {
  Handle handle, type;
  int64_t values = 0;  // 1 for a scalar
};

struct H5File::State {
  Handle file;
  std::map<std::string, Dataset, std::less<>> datasets;  // the ones in use
  bool writing = false;
  bool failed = false;
  File raw;  // when reading, and its size then
  int64_t file_bytes = 0;

  // Leaves every identifier open for the rest of the process: a close would write. The file keeps
  // its descriptor and so its inode, which HDF5 would otherwise confuse with a later file's.
  void Abandon(const std::string& path) {
    failed = true;
    for (auto& entry : datasets) entry.second.handle.Release();
    file.Release();
    // Returns the space at once, even while the descriptor stays open. Nothing is left to save.
    if (truncate(path.c_str(), 0) != 0) return;
  }
};

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
  const absl::Status status = Error(code_, path_ + ": " + what + ": " + Reason());
  if (state_ != nullptr && state_->writing) state_->Abandon(path_);
  return status;
}

absl::Status H5File::CheckWritable() const {
  KRAIT_CHECK(state_ != nullptr && state_->writing);
  if (state_->failed) return Error(code_, path_ + ": an earlier write failed");
  return absl::OkStatus();
}

absl::StatusOr<H5File> H5File::Create(const std::string& path, ExitCode code) {
  const Session session;
  H5File result;
  result.path_ = path;
  result.code_ = code;
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  if (!access.ok() || !creation.ok() ||
      H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110) < 0 ||
      H5Pset_alignment(access.get(), kAlignment, kAlignment) < 0 ||
      H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG) < 0 ||
      H5Pset_file_locking(access.get(), false, true) < 0 ||
      H5Pset_obj_track_times(creation.get(), false) < 0) {
    return result.Fail("cannot prepare the file");
  }
  Handle file(H5Fcreate(path.c_str(), H5F_ACC_EXCL, creation.get(), access.get()), H5Fclose);
  if (!file.ok()) return result.Fail("cannot create the file");
  result.state_ = std::make_unique<State>();
  result.state_->file = std::move(file);
  result.state_->writing = true;
  return result;
}

absl::StatusOr<H5File> H5File::OpenRead(const std::string& path, ExitCode code) {
  H5File result;
  result.path_ = path;
  result.code_ = code;
  // A look at the first bytes gives clearer reasons than HDF5 does.
  KRAIT_ASSIGN_OR_RETURN(File raw, File::OpenRead(path, code));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, raw.Size());
  constexpr unsigned char kSignature[8] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1A, '\n'};
  // Superblock 3 comes with checksums in all metadata. HDF5 1.10 reads outside its memory where a
  // file of the older formats is damaged.
  constexpr unsigned char kSuperblock = 3;
  unsigned char start[sizeof(kSignature) + 1] = {};
  if (size == 0) return Error(code, path + " is empty; an HDF5 file is needed");
  if (size >= static_cast<int64_t>(sizeof(start))) {
    KRAIT_RETURN_IF_ERROR(raw.ReadAt(start, sizeof(start), 0));
  }
  if (std::memcmp(start, kSignature, sizeof(kSignature)) != 0) {
    return Error(code, path + " is not an HDF5 file (no HDF5 signature at byte 0)");
  }
  if (start[sizeof(kSignature)] != kSuperblock) {
    return Error(code, path + " is of HDF5 file format " + std::to_string(start[8]) +
                           "; format 3 is needed, which has checksums: h5repack --latest " + path +
                           " NEW_FILE rewrites it (in h5py: libver=\"latest\")");
  }
  const Session session;
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  if (!access.ok() || H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG) < 0 ||
      H5Pset_file_locking(access.get(), false, true) < 0) {
    return result.Fail("cannot prepare to read");
  }
  Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
  if (!file.ok()) {
    return result.Fail("damaged, truncated or never completed HDF5 file of " +
                       std::to_string(size) + " bytes");
  }
  result.state_ = std::make_unique<State>();
  result.state_->file = std::move(file);
  result.state_->raw = std::move(raw);
  result.state_->file_bytes = size;
  return result;
}

absl::Status H5File::Close() {
  if (state_ == nullptr) return absl::OkStatus();
  const Session session;
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
  const absl::Status status = Error(code_, path_ + ": " + failed + ": " + Reason());
  if (state->writing) state->Abandon(path_);
  return status;
}

absl::Status H5File::WriteAttribute(std::string_view name, std::string_view value) {
  KRAIT_RETURN_IF_ERROR(CheckWritable());
  const Session session;
  const std::string text(value);
  const std::string attribute_name(name);
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  // NUL-terminated with room for the NUL: a size of 0 is not allowed.
  if (!type.ok() || !space.ok() || H5Tset_size(type.get(), text.size() + 1) < 0 ||
      H5Tset_cset(type.get(), H5T_CSET_UTF8) < 0) {
    return Fail("attribute " + attribute_name);
  }
  Handle attribute(H5Acreate2(state_->file.get(), attribute_name.c_str(), type.get(), space.get(),
                              H5P_DEFAULT, H5P_DEFAULT),
                   H5Aclose);
  if (!attribute.ok() || H5Awrite(attribute.get(), type.get(), text.c_str()) < 0 ||
      !attribute.Close()) {
    return Fail("cannot write attribute " + attribute_name);
  }
  return absl::OkStatus();
}

absl::Status H5File::WriteAttribute(std::string_view name, uint64_t value) {
  KRAIT_RETURN_IF_ERROR(CheckWritable());
  const Session session;
  const std::string attribute_name(name);
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  Handle attribute(H5Acreate2(state_->file.get(), attribute_name.c_str(), H5T_STD_U64LE,
                              space.get(), H5P_DEFAULT, H5P_DEFAULT),
                   H5Aclose);
  if (!attribute.ok() || H5Awrite(attribute.get(), H5T_STD_U64LE, &value) < 0 ||
      !attribute.Close()) {
    return Fail("cannot write attribute " + attribute_name);
  }
  return absl::OkStatus();
}

absl::StatusOr<H5File::Attribute> H5File::OpenAttribute(const std::string& name) const {
  KRAIT_CHECK(state_ != nullptr);
  const hid_t file = state_->file.get();
  if (H5Aexists(file, name.c_str()) <= 0) {
    return Error(code_, path_ + ": attribute " + name + " is missing");
  }
  Attribute attribute;
  attribute.handle = Handle(H5Aopen(file, name.c_str(), H5P_DEFAULT), H5Aclose);
  if (!attribute.handle.ok()) return Fail("attribute " + name);
  attribute.type = Handle(H5Aget_type(attribute.handle.get()), H5Tclose);
  const Handle space(H5Aget_space(attribute.handle.get()), H5Sclose);
  if (!attribute.type.ok() || !space.ok()) return Fail("attribute " + name);
  attribute.values = H5Sget_simple_extent_npoints(space.get());
  return attribute;
}

absl::StatusOr<std::string> H5File::ReadStringAttribute(std::string_view name) const {
  const Session session;
  const std::string label(name);
  KRAIT_ASSIGN_OR_RETURN(const Attribute attribute, OpenAttribute(label));
  const hid_t type = attribute.type.get();
  if (H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0 || attribute.values != 1) {
    return Error(code_, path_ + ": attribute " + label + " must be one string of fixed length");
  }
  const size_t size = H5Tget_size(type);
  if (size == 0 || size > kMaxStringAttribute) {
    return Error(code_, path_ + ": attribute " + label + " has " + std::to_string(size) +
                            " bytes; at most 65536 are accepted");
  }
  std::string value(size, '\0');
  if (H5Aread(attribute.handle.get(), type, value.data()) < 0) return Fail("attribute " + label);
  value.resize(strnlen(value.data(), size));
  return value;
}

absl::StatusOr<uint64_t> H5File::ReadIntAttribute(std::string_view name) const {
  const Session session;
  const std::string label(name);
  KRAIT_ASSIGN_OR_RETURN(const Attribute attribute, OpenAttribute(label));
  const hid_t type = attribute.type.get();
  if (H5Tget_class(type) != H5T_INTEGER || H5Tget_size(type) > 8 || attribute.values != 1) {
    return Error(code_, path_ + ": attribute " + label + " must be one integer");
  }
  const bool is_signed = H5Tget_sign(type) != H5T_SGN_NONE;
  int64_t value = 0;  // the same bits, whichever sign
  if (H5Aread(attribute.handle.get(), is_signed ? H5T_NATIVE_INT64 : H5T_NATIVE_UINT64, &value) <
      0) {
    return Fail("attribute " + label);
  }
  if (is_signed && value < 0) {
    return Error(code_, path_ + ": attribute " + label + " is " + std::to_string(value) +
                            "; it must not be negative");
  }
  return static_cast<uint64_t>(value);
}

absl::Status H5File::CreateChunked(std::string_view name, DType dtype, int64_t chunk_elements) {
  KRAIT_RETURN_IF_ERROR(CheckWritable());
  KRAIT_CHECK(chunk_elements > 0);
  const Session session;
  const std::string dataset_name(name);
  const Handle type = TypeOf(dtype);
  const Handle properties = DatasetProperties();
  const hsize_t none = 0;
  const hsize_t unlimited = H5S_UNLIMITED;
  const hsize_t chunk = static_cast<hsize_t>(chunk_elements);
  const Handle space(H5Screate_simple(1, &none, &unlimited), H5Sclose);
  if (!type.ok() || !properties.ok() || !space.ok() ||
      H5Pset_chunk(properties.get(), 1, &chunk) < 0 || H5Pset_fletcher32(properties.get()) < 0) {
    return Fail("dataset " + dataset_name);
  }
  Handle dataset(H5Dcreate2(state_->file.get(), dataset_name.c_str(), type.get(), space.get(),
                            H5P_DEFAULT, properties.get(), H5P_DEFAULT),
                 H5Dclose);
  if (!dataset.ok()) return Fail("cannot create dataset " + dataset_name);
  state_->datasets.insert_or_assign(dataset_name, Dataset{std::move(dataset), dtype, 0});
  return absl::OkStatus();
}

absl::Status H5File::Append(std::string_view name, const void* data, int64_t elements) {
  KRAIT_RETURN_IF_ERROR(CheckWritable());
  KRAIT_CHECK(elements >= 0);
  const Session session;
  const auto found = state_->datasets.find(name);
  KRAIT_CHECK(found != state_->datasets.end());
  if (elements == 0) return absl::OkStatus();
  Dataset& dataset = found->second;
  const hsize_t begin = dataset.elements;
  const hsize_t count = static_cast<hsize_t>(elements);
  const hsize_t end = begin + count;
  const Handle type = TypeOf(dataset.dtype);
  const Handle memory(H5Screate_simple(1, &count, nullptr), H5Sclose);
  bool ok = type.ok() && memory.ok() && H5Dset_extent(dataset.handle.get(), &end) >= 0;
  if (ok) {
    const Handle space(H5Dget_space(dataset.handle.get()), H5Sclose);
    ok = space.ok() &&
         H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, &begin, nullptr, &count, nullptr) >= 0 &&
         H5Dwrite(dataset.handle.get(), type.get(), memory.get(), space.get(), H5P_DEFAULT, data) >=
             0;
    // The reason is the write's; closing the selection would clear it.
    if (!ok) return Fail("cannot write " + found->first + " at element " + std::to_string(begin));
  }
  if (!ok) return Fail("cannot extend " + found->first);
  dataset.elements = end;
  return absl::OkStatus();
}

absl::StatusOr<int64_t> H5File::CreateContiguous(std::string_view name, DType dtype,
                                                 const std::vector<int64_t>& shape) {
  KRAIT_RETURN_IF_ERROR(CheckWritable());
  const Session session;
  const std::vector<std::string> prefixes = Prefixes(name);
  KRAIT_CHECK(!prefixes.empty());
  const hid_t file = state_->file.get();
  const Handle group_properties(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
  if (!group_properties.ok() || H5Pset_obj_track_times(group_properties.get(), false) < 0) {
    return Fail("groups of " + std::string(name));
  }
  for (size_t i = 0; i + 1 < prefixes.size(); ++i) {
    const htri_t exists = H5Lexists(file, prefixes[i].c_str(), H5P_DEFAULT);
    if (exists > 0) continue;
    Handle group(exists < 0 ? H5I_INVALID_HID
                            : H5Gcreate2(file, prefixes[i].c_str(), H5P_DEFAULT,
                                         group_properties.get(), H5P_DEFAULT),
                 H5Gclose);
    if (!group.ok() || !group.Close()) return Fail("cannot create group " + prefixes[i]);
  }
  std::vector<hsize_t> dims;
  for (const int64_t n : shape) {
    KRAIT_CHECK(n > 0);
    dims.push_back(static_cast<hsize_t>(n));
  }
  const Handle type = TypeOf(dtype);
  const Handle properties = DatasetProperties();
  const Handle space(dims.empty()
                         ? H5Screate(H5S_SCALAR)
                         : H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr),
                     H5Sclose);
  if (!type.ok() || !properties.ok() || !space.ok() ||
      H5Pset_layout(properties.get(), H5D_CONTIGUOUS) < 0 ||
      H5Pset_alloc_time(properties.get(), H5D_ALLOC_TIME_EARLY) < 0 ||
      H5Pset_fill_time(properties.get(), H5D_FILL_TIME_NEVER) < 0) {
    return Fail("dataset " + prefixes.back());
  }
  Handle dataset(H5Dcreate2(file, prefixes.back().c_str(), type.get(), space.get(), H5P_DEFAULT,
                            properties.get(), H5P_DEFAULT),
                 H5Dclose);
  if (!dataset.ok()) return Fail("cannot create dataset " + prefixes.back());
  const haddr_t offset = H5Dget_offset(dataset.get());
  if (offset == HADDR_UNDEF || !dataset.Close()) {
    return Fail("cannot allocate dataset " + prefixes.back());
  }
  return static_cast<int64_t>(offset);
}

absl::StatusOr<const H5File::Dataset*> H5File::Find(std::string_view name) const {
  KRAIT_CHECK(state_ != nullptr && !state_->writing);
  if (const auto found = state_->datasets.find(name); found != state_->datasets.end()) {
    return &found->second;
  }
  const hid_t file = state_->file.get();
  const std::vector<std::string> prefixes = Prefixes(name);
  KRAIT_CHECK(!prefixes.empty());
  for (const std::string& prefix : prefixes) {
    const htri_t exists = H5Lexists(file, prefix.c_str(), H5P_DEFAULT);
    if (exists < 0) return Fail("cannot look up " + prefix);
    if (exists == 0) return Error(code_, path_ + ": dataset " + prefix + " is missing");
    H5L_info_t link;
    if (H5Lget_info(file, prefix.c_str(), &link, H5P_DEFAULT) < 0) return Fail(prefix);
    if (link.type != H5L_TYPE_HARD) {
      return Error(code_, path_ + ": " + prefix + " is a soft or external link; not accepted");
    }
  }
  const std::string& label = prefixes.back();
  const Handle object(H5Oopen(file, label.c_str(), H5P_DEFAULT), H5Oclose);
  if (!object.ok()) return Fail("cannot open " + label);
  if (H5Iget_type(object.get()) != H5I_DATASET) {
    return Error(code_, path_ + ": " + label + " is not a dataset");
  }
  Handle dataset(H5Dopen2(file, label.c_str(), H5P_DEFAULT), H5Dclose);
  if (!dataset.ok()) return Fail("cannot open " + label);
  const Handle space(H5Dget_space(dataset.get()), H5Sclose);
  const Handle type(H5Dget_type(dataset.get()), H5Tclose);
  if (!space.ok() || !type.ok()) return Fail("cannot open " + label);
  const int rank = H5Sget_simple_extent_ndims(space.get());
  hsize_t elements = 0;
  if (H5Sis_simple(space.get()) <= 0 || rank != 1 ||
      H5Sget_simple_extent_dims(space.get(), &elements, nullptr) != 1) {
    return Error(code_, path_ + ": " + label + " has " + std::to_string(rank) +
                            " dimensions; one is needed");
  }
  const DType* dtype = nullptr;
  for (const DType& candidate : kDTypes) {
    const Handle known = TypeOf(candidate);
    if (known.ok() && H5Tequal(type.get(), known.get()) > 0) dtype = &candidate;
  }
  if (dtype == nullptr) {
    return Error(code_, path_ + ": " + label +
                            " has an unknown element type; little-endian integers and floats of "
                            "the usual sizes are accepted");
  }
  const size_t element_bytes = static_cast<size_t>(SizeOf(*dtype));
  if (elements > static_cast<uint64_t>(state_->file_bytes) / element_bytes) {
    return Error(code_, path_ + ": " + label + " declares " + std::to_string(elements) +
                            " elements of " + std::to_string(element_bytes) +
                            " bytes, more than the file of " + std::to_string(state_->file_bytes) +
                            " bytes holds");
  }
  const std::string fault =
      StorageFault(dataset.get(), elements * element_bytes, element_bytes, elements);
  if (!fault.empty()) return Error(code_, path_ + ": " + label + ": " + fault);
  const auto inserted = state_->datasets.insert_or_assign(
      std::string(name), Dataset{std::move(dataset), *dtype, elements});
  return &inserted.first->second;
}

absl::StatusOr<H5File::Info> H5File::Stat(std::string_view name) const {
  const Session session;
  KRAIT_ASSIGN_OR_RETURN(const Dataset* dataset, Find(name));
  return Info{dataset->dtype, static_cast<int64_t>(dataset->elements)};
}

absl::Status H5File::Read(std::string_view name, int64_t begin, int64_t count, void* out) const {
  const Session session;
  KRAIT_ASSIGN_OR_RETURN(const Dataset* dataset, Find(name));
  KRAIT_CHECK(begin >= 0 && count >= 0 && static_cast<uint64_t>(begin) <= dataset->elements &&
              static_cast<uint64_t>(count) <= dataset->elements - static_cast<uint64_t>(begin));
  if (count == 0) return absl::OkStatus();
  // HDF5 reads zeros beyond the end of a file, and zeros have a sound Fletcher32 sum.
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, state_->raw.Size());
  if (size < state_->file_bytes) {
    return Error(code_, path_ + " was cut from " + std::to_string(state_->file_bytes) + " to " +
                            std::to_string(size) + " bytes while in use");
  }
  const std::string label =
      "cannot read " + std::string(name) + " at element " + std::to_string(begin);
  const hsize_t first = static_cast<hsize_t>(begin);
  const hsize_t length = static_cast<hsize_t>(count);
  const Handle type = TypeOf(dataset->dtype);
  const Handle memory(H5Screate_simple(1, &length, nullptr), H5Sclose);
  const Handle space(H5Dget_space(dataset->handle.get()), H5Sclose);
  if (!type.ok() || !memory.ok() || !space.ok() ||
      H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, &first, nullptr, &length, nullptr) < 0 ||
      H5Dread(dataset->handle.get(), type.get(), memory.get(), space.get(), H5P_DEFAULT, out) < 0) {
    return Fail(label);
  }
  return absl::OkStatus();
}

}  // namespace krait
