#include "kernels/base/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/json.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr ExitCode kSave = ExitCode::kCannotSave;

class SafetensorsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "krait_safetensors_test_" + std::to_string(getpid());
    std::filesystem::remove_all(dir_);
    ASSERT_TRUE(MakeDirectories(dir_, kSave).ok());
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  // A file with this header text (its length in front) and this data.
  std::string Put(const std::string& header, const std::string& data) {
    const uint64_t length = header.size();
    std::string bytes(reinterpret_cast<const char*>(&length), 8);
    return PutBytes(bytes + header + data);
  }
  std::string PutBytes(const std::string& bytes) {
    const std::string path = dir_ + "/x.safetensors";
    auto file = File::Create(path, /*exclusive=*/false, kSave);
    EXPECT_TRUE(file.ok() && file->WriteAt(bytes.data(), bytes.size(), 0).ok());
    return path;
  }
  // The message of the refusal; the exit code and the path in it are checked here.
  std::string Refused(const std::string& path) {
    const absl::Status status = SafetensorsReader::OpenFile(path).status();
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kNoCheckpoint);
    EXPECT_THAT(MessageOf(status), HasSubstr(path));
    return MessageOf(status);
  }
  void WriteFloats(const std::string& path, const std::string& name,
                   const std::vector<float>& data) {
    auto writer = SafetensorsWriter::Create(
        path, {{name, DType::kF32, {static_cast<int64_t>(data.size())}}}, {});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(writer->Write(data.data(), static_cast<int64_t>(4 * data.size())).ok());
    ASSERT_TRUE(writer->Finish().ok());
  }
  std::string dir_;
};

TEST_F(SafetensorsTest, RoundTripOfEveryReadableDtype) {
  const std::string path = dir_ + "/all.safetensors";
  const std::vector<float> f32 = {1.5f, -0.0f, 3e38f, 1e-40f, 7, 8};
  const std::vector<double> f64 = {0.1, -2};
  const std::vector<uint16_t> bf16 = {0x3F80, 0xC000, 0x7F80, 0x0001};  // 1, -2, inf, denormal
  const std::vector<int32_t> i32 = {1, -2, INT32_MAX, INT32_MIN};
  const std::vector<int64_t> i64 = {5, -6}, big = {0, int64_t{1} << 31};
  const std::vector<uint8_t> u8 = {0, 255};
  const float scalar = 42;
  {
    auto writer = SafetensorsWriter::Create(path,
                                            {{"f32", DType::kF32, {2, 3}},
                                             {"f64", DType::kF64, {2}},
                                             {"bf16", DType::kBF16, {4}},
                                             {"i32", DType::kI32, {4}},
                                             {"i64", DType::kI64, {2, 1}},
                                             {"big", DType::kI64, {2}},
                                             {"u8", DType::kU8, {2}},
                                             {"empty", DType::kF32, {0, 5}},
                                             {"scalar", DType::kF32, {}}},
                                            {{"format", "pt"}});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(writer->Write(f32.data(), 24).ok());
    ASSERT_TRUE(writer->Write(f64.data(), 16).ok());
    ASSERT_TRUE(writer->Write(bf16.data(), 8).ok());
    ASSERT_TRUE(writer->Write(i32.data(), 16).ok());
    ASSERT_TRUE(writer->Write(i64.data(), 16).ok());
    ASSERT_TRUE(writer->Write(big.data(), 16).ok());
    ASSERT_TRUE(writer->Write(u8.data(), 2).ok());
    ASSERT_TRUE(writer->Write(nullptr, 0).ok());
    ASSERT_TRUE(writer->Write(&scalar, 4).ok());
    EXPECT_FALSE(Exists(path));  // nothing before Finish
    ASSERT_TRUE(writer->Finish().ok());
  }
  auto reader = SafetensorsReader::OpenFile(path);
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ(reader->entries().size(), 9u);
  EXPECT_EQ(reader->metadata().at("format"), "pt");
  EXPECT_THAT(reader->entries().at("f32").shape, ElementsAre(2, 3));
  EXPECT_EQ(reader->entries().at("f32").begin % 8, 0);

  std::vector<float> out(6);
  ASSERT_TRUE(reader->ReadF32("f32", 0, 6, out.data()).ok());
  EXPECT_EQ(std::memcmp(out.data(), f32.data(), 24), 0);
  ASSERT_TRUE(reader->ReadF32("f32", 4, 2, out.data()).ok());
  EXPECT_EQ(out[0], 7);
  ASSERT_TRUE(reader->ReadF32("f64", 0, 2, out.data()).ok());
  EXPECT_EQ(out[0], 0.1f);
  ASSERT_TRUE(reader->ReadF32("bf16", 0, 4, out.data()).ok());
  EXPECT_THAT(std::vector<float>(out.begin(), out.begin() + 4),
              ElementsAre(1.0f, -2.0f, INFINITY, std::ldexp(1.0f, -133)));
  ASSERT_TRUE(reader->ReadF32("scalar", 0, 1, out.data()).ok());
  EXPECT_EQ(out[0], 42);
  ASSERT_TRUE(reader->ReadF32("empty", 0, 0, nullptr).ok());

  std::vector<int32_t> ints(4);
  ASSERT_TRUE(reader->ReadI32("i32", 0, 4, ints.data()).ok());
  EXPECT_EQ(ints, i32);
  ASSERT_TRUE(reader->ReadI32("i64", 0, 2, ints.data()).ok());
  EXPECT_EQ(ints[1], -6);
  ASSERT_TRUE(reader->ReadI32("u8", 0, 2, ints.data()).ok());
  EXPECT_EQ(ints[1], 255);
  EXPECT_THAT(MessageOf(reader->ReadI32("big", 0, 2, ints.data())), HasSubstr("outside i32"));
  EXPECT_THAT(MessageOf(reader->ReadI32("f32", 0, 1, ints.data())), HasSubstr("dtype F32"));
  EXPECT_THAT(MessageOf(reader->ReadF32("i64", 0, 1, out.data())), HasSubstr("dtype I64"));
  EXPECT_THAT(MessageOf(reader->ReadF32("nope", 0, 1, out.data())),
              AllOf(HasSubstr(path), HasSubstr("'nope'")));
}

// Of every one of the 65,536 halves, from the format's definition; a double is rounded once.
TEST_F(SafetensorsTest, HalvesAreWidenedExactlyAndDoublesRoundedOnce) {
  std::string halves;
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    halves.append(reinterpret_cast<const char*>(&bits), 2);
  }
  auto reader = SafetensorsReader::OpenFile(
      Put(R"({"x":{"dtype":"F16","shape":[65536],"data_offsets":[0,131072]}})", halves));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ(reader->entries().at("x").stored, "F16");
  EXPECT_TRUE(reader->entries().at("x").IsFloat());
  std::vector<float> out(65536);
  ASSERT_TRUE(reader->ReadF32("x", 0, 65536, out.data()).ok());
  for (int i = 0; i < 65536; ++i) {
    const int exponent = i >> 10 & 31, mantissa = i & 1023;
    const float got = out[static_cast<size_t>(i)];
    EXPECT_EQ(std::signbit(got), i >= 32768) << i;
    if (exponent == 31) {
      EXPECT_TRUE(mantissa == 0 ? std::isinf(got) : std::isnan(got)) << i;
    } else {
      const float want = exponent == 0
                             ? std::ldexp(static_cast<float>(mantissa), -24)
                             : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      EXPECT_EQ(std::abs(got), want) << i;
    }
  }

  // The first is above the tie between 1 and the float after it by less than a double rounding in
  // between would keep; the second is the largest float, the third rounds up to infinity.
  const double values[] = {
      1 + 0x1p-24 + 0x1p-52, -static_cast<double>(FLT_MAX), 0x1p128, std::nan(""), INFINITY, 1e-50};
  reader =
      SafetensorsReader::OpenFile(Put(R"({"x":{"dtype":"F64","shape":[6],"data_offsets":[0,48]}})",
                                      {reinterpret_cast<const char*>(values), 48}));
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_TRUE(reader->ReadF32("x", 0, 2, out.data()).ok());
  EXPECT_EQ(out[0], 1 + 0x1p-23f);
  EXPECT_EQ(out[1], -FLT_MAX);
  ASSERT_TRUE(reader->ReadF32("x", 3, 3, out.data()).ok());
  EXPECT_TRUE(std::isnan(out[0]) && std::isinf(out[1]) && out[2] == 0);
  EXPECT_THAT(MessageOf(reader->ReadF32("x", 1, 3, out.data())), HasSubstr("beyond f32"));
}

// Tensors of dtypes that Krait has none of may lie beside those that are read.
TEST_F(SafetensorsTest, OtherDtypesAreNoObstacle) {
  std::string header = "{";
  int64_t at = 0;
  const std::pair<const char*, int> types[] = {{"BOOL", 8},    {"I8", 8},      {"I16", 16},
                                               {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8},
                                               {"F4", 4},      {"C64", 64},    {"F32", 32}};
  for (const auto& [name, bits] : types) {
    const int64_t end = at + 4 * bits / 8;
    header += (at == 0 ? "\"" : ",\"") + std::string(name) + R"(":{"dtype":")" + name +
              R"(","shape":[2,2],"data_offsets":[)" + std::to_string(at) + "," +
              std::to_string(end) + "]}";
    at = end;
  }
  const auto reader =
      SafetensorsReader::OpenFile(Put(header + "}", std::string(static_cast<size_t>(at), 'x')));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ(reader->entries().size(), 9u);
  float out[4];
  EXPECT_TRUE(reader->ReadF32("F32", 0, 4, out).ok());
  EXPECT_THAT(MessageOf(reader->ReadF32("F8_E4M3", 0, 4, out)), HasSubstr("dtype F8_E4M3"));
}

TEST_F(SafetensorsTest, PiecesOfALargeTensor) {
  // Above the reader's buffer of 1 MiB, as bf16 so that pieces and elements differ.
  const std::string path = dir_ + "/large.safetensors";
  std::vector<uint16_t> data(1500000);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint16_t>(i % 0x7F00);
  auto writer = SafetensorsWriter::Create(path, {{"x", DType::kBF16, {1500000}}}, {});
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer->Write(data.data(), 3000000).ok());
  ASSERT_TRUE(writer->Finish().ok());
  auto reader = SafetensorsReader::OpenFile(path);
  ASSERT_TRUE(reader.ok());
  std::vector<float> out(data.size() - 3);
  ASSERT_TRUE(reader->ReadF32("x", 3, static_cast<int64_t>(out.size()), out.data()).ok());
  for (size_t i = 0; i < out.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &out[i], 4);
    ASSERT_EQ(bits, static_cast<uint32_t>(data[i + 3]) << 16) << i;
  }
}

TEST_F(SafetensorsTest, AnUnfinishedWriterLeavesWhatWasThere) {
  const std::string path = dir_ + "/w.safetensors";
  WriteFloats(path, "old", {1, 2});
  {
    auto writer = SafetensorsWriter::Create(path, {{"new", DType::kF32, {4}}}, {});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(Exists(path + ".tmp"));
  }
  EXPECT_THAT(*ListDirectory(dir_, kSave), ElementsAre("w.safetensors"));
  EXPECT_TRUE(SafetensorsReader::OpenFile(path)->entries().contains("old"));
  EXPECT_EQ(ExitCodeOf(SafetensorsWriter::Create(dir_ + "/none/x", {}, {}).status()), kSave);
}

TEST_F(SafetensorsTest, ShardedFolder) {
  EXPECT_THAT(MessageOf(SafetensorsReader::OpenFolder(dir_).status()),
              HasSubstr("neither model.safetensors nor"));
  WriteFloats(dir_ + "/model-00001-of-00002.safetensors", "a", {1, 2});
  WriteFloats(dir_ + "/model-00002-of-00002.safetensors", "b", {3});
  const std::string index = dir_ + "/model.safetensors.index.json";
  const auto write = [&](const std::string& map) {
    ASSERT_TRUE(WriteFileAtomic(index, R"({"metadata":{},"weight_map":)" + map + "}", kSave).ok());
  };
  write(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  auto reader = SafetensorsReader::OpenFolder(dir_);
  ASSERT_TRUE(reader.ok()) << reader.status();
  float value = 0;
  ASSERT_TRUE(reader->ReadF32("b", 0, 1, &value).ok());
  EXPECT_EQ(value, 3);

  // All that is wrong, at once.
  write(R"({"a":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors",
            "c":"model-00003-of-00003.safetensors","d":"model-00003-of-00003.safetensors"})");
  EXPECT_EQ(MessageOf(SafetensorsReader::OpenFolder(dir_).status()),
            dir_ + "/model-00001-of-00002.safetensors has no tensor 'b'; " + index +
                " lists it there\n" + dir_ + "/model-00003-of-00003.safetensors is missing; " +
                index + " lists it");
  write(R"({"a":"../model-00001-of-00002.safetensors"})");
  EXPECT_THAT(MessageOf(SafetensorsReader::OpenFolder(dir_).status()),
              HasSubstr("not in a file beside the index"));
  write(R"({"a":7})");
  EXPECT_THAT(MessageOf(SafetensorsReader::OpenFolder(dir_).status()),
              HasSubstr("not in a file beside the index"));
  write(R"([])");
  EXPECT_THAT(MessageOf(SafetensorsReader::OpenFolder(dir_).status()), HasSubstr("weight_map"));
  ASSERT_TRUE(WriteFileAtomic(index, "", kSave).ok());
  EXPECT_THAT(MessageOf(SafetensorsReader::OpenFolder(dir_).status()), HasSubstr("not JSON"));
}

TEST_F(SafetensorsTest, BrokenHeaders) {
  EXPECT_THAT(Refused(PutBytes("")), HasSubstr("0 bytes"));
  EXPECT_THAT(Refused(PutBytes("1234567")), HasSubstr("7 bytes"));
  EXPECT_THAT(Refused(PutBytes(std::string(8, '\xff'))), HasSubstr("18446744073709551615"));
  EXPECT_THAT(Refused(PutBytes(std::string(7, '\0') + "\x80")), HasSubstr("9223372036854775808"));
  EXPECT_THAT(Refused(PutBytes("plain text, not a tensor file")), HasSubstr("Not a safetensors"));
  EXPECT_THAT(Refused(PutBytes(std::string(8, '\0'))), HasSubstr("not JSON at byte"));
  EXPECT_THAT(Refused(Put("[]", "")), HasSubstr("does not start with '{'"));
  EXPECT_THAT(Refused(Put("{} x", "")), HasSubstr("not JSON at byte 4"));
  EXPECT_THAT(Refused(Put(R"({"__metadata__":{"a":1}})", "")), HasSubstr("more than texts"));
  EXPECT_THAT(Refused(Put(R"({"__metadata__":[]})", "")), HasSubstr("not an object"));
  EXPECT_THAT(Refused(Put(std::string(1000000, '['), "")), HasSubstr("nested deeper"));
  EXPECT_THAT(Refused(Put(R"({"a":)" + std::string(100000, '{'), "")), HasSubstr("byte"));
  EXPECT_THAT(Refused(dir_), HasSubstr("is a folder"));
  EXPECT_THAT(Refused(dir_ + "/none"), HasSubstr("No such file"));
  // An empty file of tensors is a file of no tensors.
  EXPECT_TRUE(SafetensorsReader::OpenFile(Put("{}", "")).ok());
  EXPECT_THAT(Refused(Put("{}", "x")), HasSubstr("but the file has 11 bytes"));
}

TEST_F(SafetensorsTest, BrokenTensors) {
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
           "}";
  };
  const std::string data(16, 'd');
  const auto one = [&](const std::string& e) { return Refused(Put(R"({"x":)" + e + "}", data)); };
  ASSERT_TRUE(
      SafetensorsReader::OpenFile(Put(R"({"x":)" + entry("F32", "[2,2]", "[0,16]") + "}", data))
          .ok());
  EXPECT_THAT(one(entry("F99", "[8]", "[0,16]")),
              AllOf(HasSubstr("'x'"), HasSubstr("unknown dtype F99")));
  EXPECT_THAT(one(entry("F4", "[31]", "[0,16]")), HasSubstr("inside a byte"));
  EXPECT_THAT(one(entry("F32", "[2,2]", "[0,20]")), HasSubstr("4 bytes behind the file's end"));
  EXPECT_THAT(one(entry("F32", "[5]", "[0,16]")),
              HasSubstr("16 bytes, its shape and dtype need 20"));
  EXPECT_THAT(one(entry("F32", "[3]", "[4,16]")), HasSubstr("leaving a hole"));
  EXPECT_THAT(one(entry("F32", "[3]", "[0,12]")), HasSubstr("tensors end at byte"));
  EXPECT_THAT(one(entry("F32", "[4]", "[16,0]")), HasSubstr("broken data_offsets"));
  EXPECT_THAT(one(entry("F32", "[4]", "[-16,0]")), HasSubstr("broken data_offsets"));
  EXPECT_THAT(one(entry("F32", "[4]", "[0,9223372036854775808]")),
              HasSubstr("broken data_offsets"));
  EXPECT_THAT(one(entry("F32", "[4]", "[0,18446744073709551632]")),
              HasSubstr("broken data_offsets"));
  EXPECT_THAT(one(entry("F32", "[4]", "[0,16,16]")), HasSubstr("no data_offsets"));
  EXPECT_THAT(one(entry("F32", "[4]", "[0,1.6e1]")), HasSubstr("broken data_offsets"));
  EXPECT_THAT(one(entry("F32", "[-4]", "[0,16]")), HasSubstr("not made of counts"));
  EXPECT_THAT(one(entry("F32", "[4.0]", "[0,16]")), HasSubstr("not made of counts"));
  EXPECT_THAT(one(entry("F32", "4", "[0,16]")), HasSubstr("no shape"));
  EXPECT_THAT(one(entry("F32", "[9223372036854775807]", "[0,16]")), HasSubstr("overflows"));
  // 2^62 * 4 * 4 bytes is 2^66, which is 0 modulo 2^64.
  EXPECT_THAT(one(entry("F32", "[4611686018427387904,4]", "[0,16]")), HasSubstr("overflows"));
  EXPECT_THAT(one(entry("F32", "[4611686018427387904,4,0]", "[0,0]")), HasSubstr("overflows"));
  std::string ones = "[1";
  for (int i = 0; i < 40; ++i) ones += ",1";
  EXPECT_THAT(one(entry("F32", ones + "]", "[0,4]")), HasSubstr("41 dimensions"));
  EXPECT_THAT(one("7"), HasSubstr("is not an object"));
  EXPECT_THAT(one("{}"), HasSubstr("has no dtype"));

  const std::string half = entry("F32", "[2]", "[0,8]"), rest = entry("F32", "[2]", "[8,16]");
  EXPECT_THAT(Refused(Put(R"({"a":)" + half + R"(,"a":)" + rest + "}", data)),
              HasSubstr("'a' appears twice"));
  EXPECT_THAT(Refused(Put(R"({"a":)" + half + R"(,"b":)" + half + "}", data)),
              AllOf(HasSubstr("'b'"), HasSubstr("inside the tensor that ends at byte")));
  EXPECT_THAT(
      Refused(Put(R"({"a":)" + half + R"(,"b":)" + entry("F32", "[3]", "[4,16]") + "}", data)),
      HasSubstr("inside the tensor"));
}

TEST_F(SafetensorsTest, FuzzedFilesAreRefusedOrReadWithinBounds) {
  const std::string path = dir_ + "/good.safetensors";
  const std::vector<float> data(64, 1.25f);
  auto writer = SafetensorsWriter::Create(path,
                                          {{"layers.0.a", DType::kF32, {4, 8}},
                                           {"layers.0.b", DType::kBF16, {32}},
                                           {"layers.1.c", DType::kI64, {3, 1, 2}}},
                                          {{"format", "pt"}});
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer->Write(data.data(), 128).ok());
  ASSERT_TRUE(writer->Write(data.data(), 64).ok());
  ASSERT_TRUE(writer->Write(data.data(), 48).ok());
  ASSERT_TRUE(writer->Finish().ok());
  const std::string good = *ReadFile(path, 1 << 20, ExitCode::kData);
  const size_t header_end = good.size() - 240;

  // Whatever is accepted must be readable to its end: ASan watches the buffers.
  int refused = 0;
  const auto open = [&](const std::string& bytes) {
    auto reader = SafetensorsReader::OpenFile(PutBytes(bytes));
    if (!reader.ok()) {
      ++refused;
      ASSERT_EQ(ExitCodeOf(reader.status()), ExitCode::kNoCheckpoint);
      ASSERT_THAT(MessageOf(reader.status()), HasSubstr(dir_));
      return;
    }
    for (const auto& [name, entry] : reader->entries()) {
      const int64_t count = entry.numel();
      ASSERT_LE(entry.begin + entry.bytes, static_cast<int64_t>(bytes.size()));
      std::vector<float> floats(static_cast<size_t>(count));
      std::vector<int32_t> ints(static_cast<size_t>(count));
      reader->ReadF32(name, 0, count, floats.data()).IgnoreError();
      reader->ReadI32(name, 0, count, ints.data()).IgnoreError();
    }
  };
  for (size_t size = 0; size < good.size(); ++size) open(good.substr(0, size));
  EXPECT_EQ(refused, static_cast<int>(good.size()));  // every truncation is noticed
  refused = 0;
  open(good + "x");
  EXPECT_EQ(refused, 1);

  std::mt19937 random(20260131);
  const auto below = [&](size_t n) { return random() % n; };
  const std::string alphabet = "0123456789[]{},:\"-.eE \\FBIU\xff";
  for (int i = 0; i < 6000; ++i) {
    std::string bytes = good;
    const size_t changes = 1 + below(3);
    for (size_t k = 0; k < changes; ++k) {
      const size_t at = below(header_end);
      switch (below(4)) {
        case 0:
          bytes[at] = static_cast<char>(bytes[at] ^ 1 << below(8));
          break;
        case 1:
          bytes[at] = alphabet[below(alphabet.size())];
          break;
        case 2:  // length kept right: a change inside a well-formed header
          bytes.erase(std::max<size_t>(8, at), 1);
          break;
        default:
          bytes.insert(std::max<size_t>(8, at), 1, alphabet[below(alphabet.size())]);
      }
    }
    if (below(2) == 0) {
      const uint64_t length = bytes.size() - 240;
      std::memcpy(bytes.data(), &length, 8);
    }
    ASSERT_NO_FATAL_FAILURE(open(bytes)) << i;
  }
  EXPECT_GT(refused, 4000);  // changed names and metadata are still good files
}

TEST(ParseJson, StrictAndBounded) {
  const auto message = [](const std::string& text) {
    return MessageOf(ParseJson(text, "here", ExitCode::kData).status());
  };
  auto good = ParseJson(R"({"a":[1,-2,2.5,"x",null,true],"b":{}})", "here", ExitCode::kData);
  ASSERT_TRUE(good.ok());
  EXPECT_EQ((*good)["a"][2], 2.5);
  EXPECT_EQ(message(R"({"a":{"b":1,"b":2}})"), "here: the key 'b' appears twice");
  EXPECT_TRUE(ParseJson(R"([{"a":1},{"a":{"a":2}}])", "here", ExitCode::kData).ok());
  EXPECT_THAT(message("{\"a\":1,}"), HasSubstr("not JSON at byte 8"));
  EXPECT_THAT(message(""), HasSubstr("not JSON"));
  EXPECT_THAT(message("{\"a\":NaN}"), HasSubstr("not JSON"));
  EXPECT_THAT(message("{\"a\":01}"), HasSubstr("not JSON"));
  EXPECT_THAT(message("[1e999]"), HasSubstr("here: "));
  EXPECT_THAT(message("[\"\xff\"]"), HasSubstr("not JSON"));
  EXPECT_THAT(message("[1] [2]"), HasSubstr("not JSON"));
  EXPECT_TRUE(ParseJson(std::string(32, '[') + std::string(32, ']'), "", ExitCode::kData).ok());
  EXPECT_THAT(message(std::string(33, '[') + std::string(33, ']')), HasSubstr("deeper than 32"));
}

TEST(ParsePythonJson, NumbersThatAreNotFinite) {
  const std::string text =
      R"({"a": [1, Infinity, -Infinity], "b": NaN, "NaN": "Infinity \"NaN\" -Infinity\\", "c": {"d": Infinity}})";
  const auto json = ParsePythonJson(text, "here", ExitCode::kData);
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ((*json)["a"][1].get<double>(), INFINITY);
  EXPECT_EQ((*json)["a"][2].get<double>(), -INFINITY);
  EXPECT_TRUE(std::isnan((*json)["b"].get<double>()));
  EXPECT_EQ((*json)["NaN"], "Infinity \"NaN\" -Infinity\\");
  EXPECT_EQ((*json)["c"]["d"].get<double>(), INFINITY);
  // And back.
  const std::string dumped = DumpPythonJson(*json);
  EXPECT_THAT(dumped, HasSubstr("[1,Infinity,-Infinity]"));
  EXPECT_THAT(dumped, HasSubstr("\"b\":NaN"));
  const auto again = ParsePythonJson(dumped, "here", ExitCode::kData);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(DumpPythonJson(*again), dumped);
  for (const char* broken :
       {"{\"a\": Nan}", "[Infinity2]", "[+Infinity]", "[xNaN]", "[- Infinity]", "[NaN"}) {
    EXPECT_FALSE(ParsePythonJson(broken, "here", ExitCode::kData).ok()) << broken;
  }
  EXPECT_THAT(MessageOf(ParsePythonJson("[Infinity, }", "here", ExitCode::kData).status()),
              HasSubstr("at byte 12"));
}

}  // namespace
}  // namespace krait
