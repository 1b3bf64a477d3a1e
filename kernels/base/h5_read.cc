// Opening files, and reading attributes and datasets that somebody else may have written.
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/h5.h"
#include "kernels/base/h5_internal.h"

namespace krait {
namespace {

using h5::Handle;
using h5::Prefixes;
using h5::Reason;
using h5::Session;
using h5::TypeOf;

constexpr hsize_t kMaxChunkBytes = hsize_t{64} << 20;
constexpr size_t kMaxStringAttribute = size_t{64} << 10;

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF64, DType::kI32, DType::kI64,
                             DType::kU8,  DType::kU16,  DType::kU32, DType::kU64};

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

bool H5File::HasAttribute(std::string_view name) const {
  KRAIT_CHECK(state_ != nullptr);
  const Session session;
  return H5Aexists(state_->file.get(), std::string(name).c_str()) > 0;
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
