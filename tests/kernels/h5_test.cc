#include "kernels/base/h5.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>

#include "kernels/base/file.h"
#include "kernels/base/random.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

class H5Test : public ::testing::Test {
 protected:
  TempFolder folder_;
  const std::string path_ = folder_ / "x.h5";
};

// A file with both kinds of dataset and both kinds of attribute.
absl::Status WriteSample(const std::string& path, int64_t elements) {
  KRAIT_ASSIGN_OR_RETURN(H5File file, H5File::Create(path, ExitCode::kCannotSave));
  KRAIT_RETURN_IF_ERROR(file.CreateChunked("tokens", DType::kU16, 1000));
  std::vector<uint16_t> values(777);
  for (int64_t done = 0; done < elements; done += 777) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<uint16_t>(done + static_cast<int64_t>(i));
    }
    KRAIT_RETURN_IF_ERROR(
        file.Append("tokens", values.data(), std::min<int64_t>(777, elements - done)));
  }
  KRAIT_RETURN_IF_ERROR(file.CreateContiguous("/weight/a.b/0", DType::kF32, {33, 65}).status());
  KRAIT_RETURN_IF_ERROR(file.CreateContiguous("/weight/a.b/1", DType::kBF16, {7}).status());
  KRAIT_RETURN_IF_ERROR(file.WriteAttribute("kind", "sample"));
  KRAIT_RETURN_IF_ERROR(file.WriteAttribute("version", uint64_t{1} << 63));
  return file.Close();
}

std::string ReadBytes(const std::string& path) {
  auto content = ReadFile(path, int64_t{1} << 30, ExitCode::kData);
  return content.ok() ? *content : "";
}

// Opens and reads all that WriteSample wrote.
absl::Status ReadSample(const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(const H5File file, H5File::OpenRead(path, ExitCode::kData));
  KRAIT_ASSIGN_OR_RETURN(const H5File::Info info, file.Stat("tokens"));
  std::vector<uint16_t> values(static_cast<size_t>(info.elements) * 4);  // room for any dtype
  KRAIT_RETURN_IF_ERROR(file.Read("tokens", 0, info.elements, values.data()));
  KRAIT_RETURN_IF_ERROR(file.ReadStringAttribute("kind").status());
  return file.ReadIntAttribute("version").status();
}

TEST_F(H5Test, RoundTripOfChunkedDataAndAttributes) {
  ASSERT_TRUE(WriteSample(path_, 12345).ok());
  auto file = H5File::OpenRead(path_, ExitCode::kData);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto info = file->Stat("tokens");
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->dtype, DType::kU16);
  EXPECT_EQ(info->elements, 12345);
  for (const auto& [begin, count] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 12345}, {0, 0}, {12345, 0}, {999, 2}, {5000, 3000}, {12344, 1}}) {
    std::vector<uint16_t> values(static_cast<size_t>(count));
    ASSERT_TRUE(file->Read("tokens", begin, count, values.data()).ok());
    for (int64_t i = 0; i < count; ++i) {
      ASSERT_EQ(values[static_cast<size_t>(i)], static_cast<uint16_t>(begin + i));
    }
  }
  EXPECT_EQ(file->ReadStringAttribute("kind").value(), "sample");
  EXPECT_EQ(file->ReadIntAttribute("version").value(), uint64_t{1} << 63);
  EXPECT_TRUE(file->Close().ok());
}

TEST_F(H5Test, ContiguousDataIsAlignedAndTheCallersBytesAreRead) {
  const std::vector<DType> dtypes = {DType::kF32, DType::kBF16, DType::kF64,
                                     DType::kI32, DType::kI64,  DType::kU8,
                                     DType::kU16, DType::kU32,  DType::kU64};
  std::vector<int64_t> offsets;
  {
    auto file = H5File::Create(path_, ExitCode::kCannotSave);
    ASSERT_TRUE(file.ok()) << file.status();
    for (const DType dtype : dtypes) {
      const auto offset =
          file->CreateContiguous(std::string("/slot/") + Name(dtype) + "/0", dtype, {5000});
      ASSERT_TRUE(offset.ok()) << offset.status();
      EXPECT_EQ(*offset % 4096, 0);
      offsets.push_back(*offset);
    }
    ASSERT_TRUE(file->CreateContiguous("/slot/scalar", DType::kF32, {}).ok());
    ASSERT_TRUE(file->CreateContiguous("/slot/box", DType::kF32, {2, 3, 4}).ok());
    ASSERT_TRUE(file->Close().ok());
  }
  auto raw = File::OpenWrite(path_, ExitCode::kCannotSave);
  ASSERT_TRUE(raw.ok());
  std::vector<std::vector<unsigned char>> contents;
  for (size_t k = 0; k < dtypes.size(); ++k) {
    // Every bit pattern, NaNs with payload too.
    std::vector<unsigned char> bytes(static_cast<size_t>(5000 * SizeOf(dtypes[k])));
    const RandomStream random(1, RandomPurpose::kSynthetic, k);
    for (size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = static_cast<unsigned char>(random.Bits(i)[0]);
    }
    EXPECT_LE(offsets[k] + static_cast<int64_t>(bytes.size()), raw->Size().value());
    ASSERT_TRUE(raw->WriteAt(bytes.data(), bytes.size(), offsets[k]).ok());
    contents.push_back(std::move(bytes));
  }
  ASSERT_TRUE(raw->Close().ok());
  const auto file = H5File::OpenRead(path_, ExitCode::kData);
  ASSERT_TRUE(file.ok()) << file.status();
  for (size_t k = 0; k < dtypes.size(); ++k) {
    const std::string name = std::string("/slot/") + Name(dtypes[k]) + "/0";
    const auto info = file->Stat(name);
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(info->dtype, dtypes[k]);
    std::vector<unsigned char> bytes(contents[k].size());
    ASSERT_TRUE(file->Read(name, 0, 5000, bytes.data()).ok());
    EXPECT_EQ(bytes, contents[k]);
  }
  EXPECT_THAT(MessageOf(file->Stat("/slot/box").status()), HasSubstr("3 dimensions"));
  EXPECT_THAT(MessageOf(file->Stat("/slot").status()), HasSubstr("not a dataset"));
}

TEST_F(H5Test, ManyTensorsFit) {
  auto file = H5File::Create(path_, ExitCode::kCannotSave);
  ASSERT_TRUE(file.ok());
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t i = 0; i < 1000; ++i) {
    const int64_t n = 1 + i * 37 % 3000;
    const auto offset = file->CreateContiguous("/weight/model.layers." + std::to_string(i) + ".w/0",
                                               DType::kF32, {n});
    ASSERT_TRUE(offset.ok()) << offset.status();
    ranges.push_back({*offset, *offset + 4 * n});
  }
  ASSERT_TRUE(file->Close().ok());
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) EXPECT_LE(ranges[i - 1].second, ranges[i].first);
  EXPECT_LE(ranges.back().second, static_cast<int64_t>(std::filesystem::file_size(path_)));
}

TEST_F(H5Test, EqualContentGivesEqualBytes) {
  ASSERT_TRUE(WriteSample(path_, 5000).ok());
  sleep(1);  // a stored time would differ
  ASSERT_TRUE(WriteSample(folder_ / "y.h5", 5000).ok());
  EXPECT_EQ(ReadBytes(path_), ReadBytes(folder_ / "y.h5"));
}

TEST_F(H5Test, CreateRefusesAnExistingPathAndAMissingFolder) {
  folder_.Write("x.h5", "precious");
  const auto existing = H5File::Create(path_, ExitCode::kCannotSave);
  EXPECT_EQ(ExitCodeOf(existing.status()), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(existing.status()), HasSubstr(path_));
  EXPECT_EQ(ReadBytes(path_), "precious");
  const auto missing = H5File::Create(folder_ / "none/x.h5", ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(missing.status()), HasSubstr("No such file or directory"));
}

TEST_F(H5Test, OpenNamesWhatIsWrong) {
  const auto fault = [&](const std::string& content) {
    folder_.Write("x.h5", content);
    const auto file = H5File::OpenRead(path_, ExitCode::kData);
    EXPECT_EQ(ExitCodeOf(file.status()), ExitCode::kData);
    EXPECT_THAT(MessageOf(file.status()), HasSubstr(path_));
    return MessageOf(file.status());
  };
  EXPECT_THAT(fault(""), HasSubstr("empty"));
  EXPECT_THAT(fault("abc"), HasSubstr("not an HDF5 file"));
  EXPECT_THAT(fault(std::string(5000, 'x')), HasSubstr("not an HDF5 file"));
  EXPECT_THAT(fault("\x89HDF\r\n\x1a\n"), HasSubstr("not an HDF5 file"));
  EXPECT_THAT(fault("\x89HDF\r\n\x1a\n\3\10\10"), HasSubstr("damaged"));
  EXPECT_THAT(MessageOf(H5File::OpenRead(folder_.path(), ExitCode::kData).status()),
              HasSubstr("folder"));
  EXPECT_THAT(MessageOf(H5File::OpenRead(folder_ / "none", ExitCode::kData).status()),
              HasSubstr("No such file"));
  const std::string fifo = folder_ / "fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_THAT(MessageOf(H5File::OpenRead(fifo, ExitCode::kData).status()),
              HasSubstr("not a regular file"));
}

TEST_F(H5Test, EveryTruncationIsNoticed) {
  ASSERT_TRUE(WriteSample(path_, 3000).ok());
  const std::string whole = ReadBytes(path_);
  for (size_t size = 0; size < whole.size(); size += 1 + size / 50) {
    folder_.Write("x.h5", whole.substr(0, size));
    EXPECT_FALSE(ReadSample(path_).ok()) << "cut to " << size << " of " << whole.size();
  }
}

// A flip is an error or changes nothing of what is read (unused bytes of the file).
TEST_F(H5Test, BitFlipsNeverReachTheReader) {
  ASSERT_TRUE(WriteSample(path_, 3000).ok());
  const std::string whole = ReadBytes(path_);
  const RandomStream random(7, RandomPurpose::kSynthetic, 0);
  int noticed = 0;
  for (uint64_t i = 0; i < 1000; ++i) {
    std::string flipped = whole;
    const auto bits = random.Bits(i);
    flipped[bits[0] % whole.size()] ^= static_cast<char>(1 << bits[1] % 8);
    auto raw = File::OpenWrite(path_, ExitCode::kData);
    ASSERT_TRUE(raw.ok() && raw->WriteAt(flipped.data(), flipped.size(), 0).ok());
    if (!ReadSample(path_).ok()) {
      ++noticed;
      continue;
    }
    const auto file = H5File::OpenRead(path_, ExitCode::kData);
    std::vector<uint16_t> values(3000);
    ASSERT_EQ(file->Stat("tokens")->elements, 3000);
    ASSERT_EQ(file->Stat("tokens")->dtype, DType::kU16);
    ASSERT_TRUE(file->Read("tokens", 0, 3000, values.data()).ok());
    for (int k = 0; k < 3000; ++k) ASSERT_EQ(values[static_cast<size_t>(k)], k);
    EXPECT_EQ(file->ReadStringAttribute("kind").value(), "sample");
    EXPECT_EQ(file->ReadIntAttribute("version").value(), uint64_t{1} << 63);
  }
  EXPECT_GT(noticed, 100);
}

// Runs `body` in a child whose files may not grow beyond `bytes` (writes fail with EFBIG, as with
// ENOSPC on a full disk); returns its wait status after a normal exit() with all exit handlers.
int RunWithFileLimit(int64_t bytes, const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {static_cast<rlim_t>(bytes), static_cast<rlim_t>(bytes)};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(99);
    std::exit(body());
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

TEST_F(H5Test, AFullDiskAtAnyPointIsAnErrorAndNeverASignal) {
  ASSERT_TRUE(WriteSample(path_, 20000).ok());
  const auto whole = static_cast<int64_t>(std::filesystem::file_size(path_));
  int failures = 0;
  for (int64_t limit = 0; limit <= whole + 4096; limit += whole / 40) {
    std::filesystem::remove(path_);
    const int status = RunWithFileLimit(limit, [&] {
      const absl::Status first = WriteSample(path_, 20000);
      if (first.ok()) return 0;
      if (ExitCodeOf(first) != ExitCode::kCannotSave) return 2;
      // The space is back, and the process goes on: a small file still fits when it may.
      if (std::filesystem::exists(path_) && std::filesystem::file_size(path_) != 0) return 3;
      std::filesystem::remove(path_);
      for (int again = 0; again < 3; ++again) {
        if (WriteSample(path_, 20000).ok()) return 4;
        std::filesystem::remove(path_);
      }
      return 1;
    });
    ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status) << " at limit " << limit;
    ASSERT_LE(WEXITSTATUS(status), 1) << "limit " << limit;
    if (WEXITSTATUS(status) == 0) {
      EXPECT_TRUE(ReadSample(path_).ok()) << "limit " << limit;
    }
    failures += WEXITSTATUS(status);
  }
  EXPECT_GE(failures, 35);
}

// Foreign files, built with HDF5 itself.
class ForeignH5Test : public H5Test {
 protected:
  void SetUp() override {
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
    file_ = H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
    H5Pclose(access);
    ASSERT_GE(file_, 0);
  }
  // A dataset "d" of `dims` with creation properties.
  void MakeDataset(hid_t type, const std::vector<hsize_t>& dims, hid_t properties) {
    const hid_t space = H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr);
    const hid_t dataset = H5Dcreate2(file_, "d", type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
    ASSERT_GE(dataset, 0);
    H5Dclose(dataset);
    H5Sclose(space);
  }
  std::string StatFault(const std::string& name = "d") {
    H5Fclose(file_);
    const auto file = H5File::OpenRead(path_, ExitCode::kData);
    if (!file.ok()) return MessageOf(file.status());
    const auto info = file->Stat(name);
    if (info.ok()) return "accepted";
    EXPECT_EQ(ExitCodeOf(info.status()), ExitCode::kData);
    EXPECT_THAT(MessageOf(info.status()), HasSubstr(path_));
    return MessageOf(info.status());
  }
  hid_t file_ = -1;
};

TEST_F(ForeignH5Test, OldFileFormatsAreRefused) {
  for (const H5F_libver_t version : {H5F_LIBVER_EARLIEST, H5F_LIBVER_V18}) {
    const std::string path = folder_ / "old.h5";
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_libver_bounds(access, version, H5F_LIBVER_V18);
    H5Fclose(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access));
    H5Pclose(access);
    const auto file = H5File::OpenRead(path, ExitCode::kData);
    EXPECT_EQ(ExitCodeOf(file.status()), ExitCode::kData);
    EXPECT_THAT(MessageOf(file.status()), HasSubstr("h5repack --latest " + path));
  }
  H5Fclose(file_);
}

TEST_F(ForeignH5Test, PlainDataIsAccepted) {
  const hsize_t n = 100;
  const hid_t space = H5Screate_simple(1, &n, nullptr);
  const hid_t dataset =
      H5Dcreate2(file_, "d", H5T_STD_U8LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  std::vector<uint8_t> values(100, 3);
  ASSERT_GE(H5Dwrite(dataset, H5T_NATIVE_UINT8, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), 0);
  H5Dclose(dataset);
  H5Sclose(space);
  EXPECT_EQ(StatFault(), "accepted");
}

TEST_F(ForeignH5Test, HugeDeclaredDataset) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_alloc_time(properties, H5D_ALLOC_TIME_LATE);
  MakeDataset(H5T_IEEE_F32LE, {hsize_t{1} << 50}, properties);
  EXPECT_THAT(StatFault(), HasSubstr("more than the file"));
}

TEST_F(ForeignH5Test, HugeCompressedDataset) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk = 1 << 20;
  H5Pset_chunk(properties, 1, &chunk);
  H5Pset_deflate(properties, 9);
  MakeDataset(H5T_STD_U8LE, {hsize_t{1} << 40}, properties);
  EXPECT_THAT(StatFault(), HasSubstr("more than the file"));
}

TEST_F(ForeignH5Test, CompressedSmallDataset) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk = 16;
  H5Pset_chunk(properties, 1, &chunk);
  H5Pset_deflate(properties, 9);
  MakeDataset(H5T_STD_U8LE, {16}, properties);
  EXPECT_THAT(StatFault(), HasSubstr("deflate"));
}

TEST_F(ForeignH5Test, MissingChunks) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk = 16;
  H5Pset_chunk(properties, 1, &chunk);
  MakeDataset(H5T_STD_U8LE, {160}, properties);
  EXPECT_THAT(StatFault(), HasSubstr("0 chunks are stored where 10 are needed"));
}

TEST_F(ForeignH5Test, ContiguousWithoutStorage) {
  MakeDataset(H5T_STD_U8LE, {160}, H5P_DEFAULT);  // late allocation: nothing written
  EXPECT_THAT(StatFault(), HasSubstr("not in the file"));
}

TEST_F(ForeignH5Test, ExternalStorage) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_external(properties, "/etc/passwd", 0, 16);
  MakeDataset(H5T_STD_U8LE, {16}, properties);
  EXPECT_THAT(StatFault(), HasSubstr("external storage"));
}

TEST_F(ForeignH5Test, VirtualStorage) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t n = 16;
  const hid_t space = H5Screate_simple(1, &n, nullptr);
  H5Pset_virtual(properties, space, "other.h5", "d", space);
  MakeDataset(H5T_STD_U8LE, {16}, properties);
  EXPECT_THAT(StatFault(), HasSubstr("virtual"));
}

TEST_F(ForeignH5Test, CompactStorage) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_layout(properties, H5D_COMPACT);
  MakeDataset(H5T_STD_U8LE, {16}, properties);
  EXPECT_THAT(StatFault(), HasSubstr("neither contiguous nor chunked"));
}

TEST_F(ForeignH5Test, LinksAreNotFollowed) {
  H5Lcreate_external("/etc/passwd", "/x", file_, "external", H5P_DEFAULT, H5P_DEFAULT);
  EXPECT_THAT(StatFault("external"), HasSubstr("soft or external link"));
}

TEST_F(ForeignH5Test, SoftLinkInThePath) {
  H5Lcreate_soft("/", file_, "loop", H5P_DEFAULT, H5P_DEFAULT);
  EXPECT_THAT(StatFault("loop/d"), HasSubstr("soft or external link"));
}

TEST_F(ForeignH5Test, MissingDataset) {
  EXPECT_THAT(StatFault("nothing/at/all"), HasSubstr("/nothing is missing"));
}

TEST_F(ForeignH5Test, ManyDimensions) {
  MakeDataset(H5T_STD_U8LE, std::vector<hsize_t>(32, 2), H5P_DEFAULT);
  EXPECT_THAT(StatFault(), HasSubstr("32 dimensions"));
}

TEST_F(ForeignH5Test, BigEndianType) {
  MakeDataset(H5T_STD_U16BE, {4}, H5P_DEFAULT);
  EXPECT_THAT(StatFault(), HasSubstr("unknown element type"));
}

TEST_F(ForeignH5Test, StringType) {
  MakeDataset(H5T_C_S1, {4}, H5P_DEFAULT);
  EXPECT_THAT(StatFault(), HasSubstr("unknown element type"));
}

TEST_F(ForeignH5Test, VariableLengthType) {
  const hid_t type = H5Tvlen_create(H5T_STD_U8LE);
  MakeDataset(type, {4}, H5P_DEFAULT);
  EXPECT_THAT(StatFault(), HasSubstr("unknown element type"));
}

TEST_F(ForeignH5Test, CompoundType) {
  const hid_t type = H5Tcreate(H5T_COMPOUND, 8);
  H5Tinsert(type, "a", 0, H5T_STD_U8LE);
  MakeDataset(type, {4}, H5P_DEFAULT);
  EXPECT_THAT(StatFault(), HasSubstr("unknown element type"));
}

TEST_F(ForeignH5Test, Attributes) {
  const auto put = [&](const char* name, hid_t type, hid_t space, const void* value) {
    const hid_t attribute = H5Acreate2(file_, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, type, value);
    H5Aclose(attribute);
  };
  const hid_t scalar = H5Screate(H5S_SCALAR);
  const hsize_t two = 2;
  const hid_t pair = H5Screate_simple(1, &two, nullptr);
  const hid_t variable = H5Tcopy(H5T_C_S1);
  H5Tset_size(variable, H5T_VARIABLE);
  const hid_t fixed = H5Tcopy(H5T_C_S1);
  H5Tset_size(fixed, 3);
  const char* text = "abc";
  const int32_t numbers[2] = {-5, 6};
  const double real = 1.5;
  put("variable", variable, scalar, &text);
  put("fixed", fixed, scalar, text);
  put("negative", H5T_STD_I32LE, scalar, numbers);
  put("small", H5T_STD_I32LE, scalar, numbers + 1);
  put("pair", H5T_STD_I32LE, pair, numbers);
  put("real", H5T_NATIVE_DOUBLE, scalar, &real);
  H5Fclose(file_);
  const auto file = H5File::OpenRead(path_, ExitCode::kData);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->ReadStringAttribute("fixed").value(), "abc");
  EXPECT_EQ(file->ReadIntAttribute("small").value(), 6u);
  EXPECT_THAT(MessageOf(file->ReadStringAttribute("variable").status()), HasSubstr("fixed length"));
  EXPECT_THAT(MessageOf(file->ReadStringAttribute("small").status()), HasSubstr("fixed length"));
  EXPECT_THAT(MessageOf(file->ReadStringAttribute("none").status()), HasSubstr("missing"));
  EXPECT_THAT(MessageOf(file->ReadIntAttribute("none").status()), HasSubstr("missing"));
  EXPECT_THAT(MessageOf(file->ReadIntAttribute("negative").status()), HasSubstr("-5"));
  EXPECT_THAT(MessageOf(file->ReadIntAttribute("pair").status()), HasSubstr("one integer"));
  EXPECT_THAT(MessageOf(file->ReadIntAttribute("real").status()), HasSubstr("one integer"));
  EXPECT_THAT(MessageOf(file->ReadIntAttribute("fixed").status()), HasSubstr("one integer"));
}

}  // namespace
}  // namespace krait
