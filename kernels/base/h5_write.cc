// Creating files, attributes and datasets.
#include "kernels/base/check.h"
#include "kernels/base/h5.h"
#include "kernels/base/h5_internal.h"

namespace krait {
namespace {

using h5::Handle;
using h5::Prefixes;
using h5::Session;
using h5::TypeOf;

constexpr hsize_t kAlignment = 4096;

Handle DatasetProperties() {
  Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  // Without times, equal content gives equal bytes.
  if (properties.ok() && H5Pset_obj_track_times(properties.get(), false) < 0) properties.Close();
  return properties;
}

}  // namespace

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

absl::Status H5File::CheckWritable() const {
  KRAIT_CHECK(state_ != nullptr && state_->writing);
  if (state_->failed) return Error(code_, path_ + ": an earlier write failed");
  return absl::OkStatus();
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

}  // namespace krait
