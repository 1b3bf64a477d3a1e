#include "data/token_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>

#include "data/content_hash.h"
#include "data/inspect.h"
#include "data/sampler.h"
#include "kernels/base/file.h"
#include "kernels/base/random.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The content of a token file; the defaults are sound.
struct Content {
  DType dtype = DType::kU16;
  std::vector<uint64_t> tokens = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  DType documents_dtype = DType::kU64;
  std::vector<uint64_t> documents = {0, 4, 9, 10};
  std::optional<uint64_t> version = kTokenFileVersion;
  std::optional<uint64_t> vocab_size = 1000;
  std::optional<std::string> tokenizer = "test";
  std::optional<std::string> hash;  // of the content when not given
  bool with_tokens = true, with_documents = true, with_hash = true;
};

std::string Narrow(const std::vector<uint64_t>& values, DType dtype) {
  std::string bytes;
  for (const uint64_t value : values) {
    // Little-endian: the low bytes come first.
    bytes.append(reinterpret_cast<const char*>(&value), static_cast<size_t>(SizeOf(dtype)));
  }
  return bytes;
}

void Write(const Content& content, const std::string& path, int64_t chunk = 4) {
  std::filesystem::remove(path);
  auto file = H5File::Create(path, ExitCode::kCannotSave);
  ASSERT_TRUE(file.ok()) << file.status();
  const std::string tokens = Narrow(content.tokens, content.dtype);
  const std::string documents = Narrow(content.documents, content.documents_dtype);
  if (content.with_tokens) {
    ASSERT_TRUE(file->CreateChunked("tokens", content.dtype, chunk).ok());
    ASSERT_TRUE(
        file->Append("tokens", tokens.data(), static_cast<int64_t>(content.tokens.size())).ok());
  }
  if (content.with_documents) {
    ASSERT_TRUE(file->CreateChunked("documents", content.documents_dtype, chunk).ok());
    ASSERT_TRUE(
        file->Append("documents", documents.data(), static_cast<int64_t>(content.documents.size()))
            .ok());
  }
  if (content.version) {
    ASSERT_TRUE(file->WriteAttribute("format_version", *content.version).ok());
  }
  if (content.vocab_size) {
    ASSERT_TRUE(file->WriteAttribute("vocab_size", *content.vocab_size).ok());
  }
  if (content.tokenizer) {
    ASSERT_TRUE(file->WriteAttribute("tokenizer", *content.tokenizer).ok());
  }
  if (content.with_hash) {
    ContentHash hash;
    hash.AddTokens(tokens.data(), tokens.size());
    hash.AddDocuments(content.documents);
    const std::string sound =
        hash.Finish(content.tokenizer.value_or(""), content.vocab_size.value_or(0));
    ASSERT_TRUE(file->WriteAttribute("content_hash", content.hash.value_or(sound)).ok());
  }
  ASSERT_TRUE(file->Close().ok());
}

// Opens, reads and verifies all.
absl::Status ReadAll(const std::string& path) {
  std::unique_ptr<TokenFile> file;
  KRAIT_ASSIGN_OR_RETURN(file, TokenFile::Open(path));
  std::vector<int32_t> ids(static_cast<size_t>(file->tokens()));
  KRAIT_RETURN_IF_ERROR(file->Read(0, file->tokens(), ids.data()));
  KRAIT_RETURN_IF_ERROR(file->DocumentStarts(0, file->tokens(), ids.data()));
  return file->Verify();
}

class TokenFileTest : public ::testing::Test {
 protected:
  // The message of the error that reading the file must give; it names the file.
  std::string Fault() {
    const absl::Status status = ReadAll(path_);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kData);
    EXPECT_THAT(MessageOf(status), HasSubstr(path_));
    EXPECT_THAT(MessageOf(status), ::testing::Not(HasSubstr("\n")));
    return MessageOf(status);
  }

  TempFolder folder_;
  const std::string path_ = folder_ / "x.h5";
};

TEST_F(TokenFileTest, RoundTripInEveryDType) {
  for (const DType dtype : {DType::kU8, DType::kU16, DType::kU32}) {
    Content content;
    content.dtype = dtype;
    content.vocab_size = dtype == DType::kU32   ? uint64_t{std::numeric_limits<int32_t>::max()}
                         : dtype == DType::kU16 ? 65536u
                                                : 256u;
    const RandomStream random(1, RandomPurpose::kSynthetic, 0);
    content.tokens.clear();
    for (uint64_t i = 0; i < 1000; ++i) {
      content.tokens.push_back(random.Bits(i)[0] % *content.vocab_size);
    }
    content.tokens[7] = *content.vocab_size - 1;
    content.documents = {0, 1, 2, 500, 999, 1000};
    Write(content, path_, 64);
    const auto file = TokenFile::Open(path_);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ((*file)->tokens(), 1000);
    EXPECT_EQ((*file)->documents(), 5);
    EXPECT_EQ((*file)->dtype(), dtype);
    EXPECT_EQ((*file)->tokenizer(), "test");
    EXPECT_EQ((*file)->document_table().All().value(), content.documents);
    EXPECT_TRUE((*file)->Verify().ok()) << (*file)->Verify();
    for (const auto& [begin, count] : std::vector<std::pair<int64_t, int64_t>>{
             {0, 1000}, {0, 0}, {1000, 0}, {63, 2}, {500, 499}, {999, 1}}) {
      std::vector<int32_t> ids(static_cast<size_t>(count));
      ASSERT_TRUE((*file)->Read(begin, count, ids.data()).ok());
      for (int64_t i = 0; i < count; ++i) {
        ASSERT_EQ(static_cast<uint64_t>(ids[static_cast<size_t>(i)]),
                  content.tokens[static_cast<size_t>(begin + i)]);
      }
    }
  }
}

TEST_F(TokenFileTest, DocumentStartsMatchASlowSearch) {
  Content content;
  content.tokens.assign(300, 1);
  content.documents = {0};
  const RandomStream random(2, RandomPurpose::kSynthetic, 0);
  for (uint64_t i = 0; content.documents.back() < 300; ++i) {
    content.documents.push_back(
        std::min<uint64_t>(300, content.documents.back() + 1 + random.Bits(i)[0] % 9));
  }
  Write(content, path_, 64);
  const auto file = TokenFile::Open(path_);
  ASSERT_TRUE(file.ok()) << file.status();
  for (int64_t begin = 0; begin < 300; begin += 7) {
    const int64_t count = std::min<int64_t>(40, 300 - begin);
    std::vector<int32_t> starts(static_cast<size_t>(count));
    ASSERT_TRUE((*file)->DocumentStarts(begin, count, starts.data()).ok());
    for (int64_t i = 0; i < count; ++i) {
      int64_t expected = 0;
      for (const uint64_t start : content.documents) {
        if (static_cast<int64_t>(start) <= begin + i) {
          expected = std::max<int64_t>(0, static_cast<int64_t>(start) - begin);
        }
      }
      ASSERT_EQ(starts[static_cast<size_t>(i)], expected) << begin << " + " << i;
    }
  }
}

TEST_F(TokenFileTest, BrokenContentIsNamed) {
  const std::vector<std::pair<std::function<void(Content&)>, std::string>> cases = {
      {[](Content& c) { c.version.reset(); }, "format_version is missing"},
      {[](Content& c) { c.version = 0; }, "format_version is 0"},
      {[](Content& c) { c.version = 2; }, "format_version is 2"},
      {[](Content& c) { c.version = ~uint64_t{0}; }, "format_version is 18446744073709551615"},
      {[](Content& c) { c.tokenizer.reset(); }, "tokenizer is missing"},
      {[](Content& c) { c.tokenizer = ""; }, "tokenizer is empty"},
      {[](Content& c) { c.vocab_size.reset(); }, "vocab_size is missing"},
      {[](Content& c) { c.vocab_size = 0; }, "vocab_size is 0"},
      {[](Content& c) { c.vocab_size = uint64_t{1} << 31; }, "vocab_size is 2147483648"},
      {[](Content& c) { c.vocab_size = ~uint64_t{0}; }, "vocab_size is 18446744073709551615"},
      {[](Content& c) { c.vocab_size = 65537; }, "does not fit"},
      {[](Content& c) { c.dtype = DType::kU8; }, "does not fit"},
      {[](Content& c) { c.vocab_size = 9; }, "/tokens[9] is 9; ids are below vocab_size 9"},
      {[](Content& c) { c.tokens[3] = 1000; }, "/tokens[3] is 1000"},
      {[](Content& c) {
         c.dtype = DType::kU32;
         c.tokens[8] = 0xFFFFFFFF;
       },
       "/tokens[8] is 4294967295"},
      {[](Content& c) {
         c.dtype = DType::kU8;
         c.vocab_size = 8;
       },
       "/tokens[8] is 8"},
      {[](Content& c) { c.with_hash = false; }, "content_hash is missing"},
      {[](Content& c) { c.hash = ""; }, "16 hexadecimal digits"},
      {[](Content& c) { c.hash = "0123456789abcde"; }, "16 hexadecimal digits"},
      {[](Content& c) { c.hash = "0123456789ABCDEF"; }, "16 hexadecimal digits"},
      {[](Content& c) { c.hash = "0123456789abcdeg"; }, "16 hexadecimal digits"},
      {[](Content& c) { c.hash = "0123456789abcdef"; }, "but content_hash is 0123456789abcdef"},
      {[](Content& c) { c.with_tokens = false; }, "/tokens is missing"},
      {[](Content& c) { c.tokens.clear(); }, "/tokens is empty"},
      {[](Content& c) { c.dtype = DType::kU64; }, "/tokens is u64"},
      {[](Content& c) { c.dtype = DType::kI32; }, "/tokens is i32"},
      {[](Content& c) { c.dtype = DType::kF32; }, "/tokens is f32"},
      {[](Content& c) { c.dtype = DType::kBF16; }, "/tokens is bf16"},
      {[](Content& c) { c.with_documents = false; }, "/documents is missing"},
      {[](Content& c) { c.documents.clear(); }, "0 elements of u64"},
      {[](Content& c) { c.documents = {0}; }, "1 elements of u64"},
      {[](Content& c) { c.documents_dtype = DType::kU32; }, "4 elements of u32"},
      {[](Content& c) { c.documents_dtype = DType::kI64; }, "4 elements of i64"},
      {[](Content& c) {
         c.documents = {1, 4, 10};
       },
       "/documents[0] is 1"},
      {[](Content& c) {
         c.documents = {0, 4, 4, 10};
       },
       "/documents[2] is 4 after 4"},
      {[](Content& c) {
         c.documents = {0, 5, 4, 10};
       },
       "/documents[2] is 4 after 5"},
      {[](Content& c) {
         c.documents = {0, 0, 10};
       },
       "/documents[1] is 0 after 0"},
      {[](Content& c) {
         c.documents = {0, ~uint64_t{0}, 10};
       },
       "/documents[2] is 10 after"},
      {[](Content& c) {
         c.documents = {0, 4, 9};
       },
       "/documents[2], the last, is 9"},
      {[](Content& c) {
         c.documents = {0, 4, 11};
       },
       "/documents[2], the last, is 11"},
      {[](Content& c) { c.documents.push_back(uint64_t{1} << 63); }, "the last, is 92233720368"},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    Content content;
    cases[i].first(content);
    Write(content, path_);
    EXPECT_THAT(Fault(), HasSubstr(cases[i].second)) << "case " << i;
  }
}

TEST_F(TokenFileTest, ForeignAndTruncatedFilesAreNamed) {
  Write(Content(), path_);
  const std::string whole = *ReadFile(path_, 1 << 20, ExitCode::kData);
  const std::vector<std::string> foreign = {
      "",
      "x",
      "text that is longer than the signature of HDF5",
      "\x89HDF\r\n\x1a\n",
      whole.substr(0, 12),
      whole.substr(0, 48),
      std::string("\x1F\x8B\x08", 3) + std::string(200, '\0'),  // gzip
      "{\"format_version\": 1}",
      "\x89PNG\r\n\x1a\n" + std::string(100, 'x'),
      std::string(1 << 16, '\0'),
      "\n" + whole,                    // shifted, as by a text-mode copy
      std::string(512, '\0') + whole,  // where HDF5 itself still finds a signature
      whole.substr(0, 8) + std::string(5000, '\0'),
      whole.substr(0, 8) + std::string(5000, '\xFF'),
      whole.substr(0, whole.size() / 2) + std::string(whole.size() - whole.size() / 2, '\0'),
      whole.substr(whole.size() / 2),
  };
  for (const std::string& content : foreign) {
    folder_.Write("x.h5", content);
    Fault();
  }
  for (size_t size = 0; size < whole.size(); size += 1 + whole.size() / 100) {
    folder_.Write("x.h5", whole.substr(0, size));
    Fault();
  }
  folder_.Write("x.h5", whole);
  EXPECT_TRUE(ReadAll(path_).ok());
  std::filesystem::remove(path_);
  EXPECT_THAT(Fault(), HasSubstr("No such file"));
  std::filesystem::create_directory(path_);
  EXPECT_THAT(Fault(), HasSubstr("folder"));
}

// A file that no longer is what it was when opened: Read meets the damage.
TEST_F(TokenFileTest, DamageAfterOpeningIsMetWhenReading) {
  Content content;
  content.tokens.assign(200000, 77);
  content.documents = {0, 200000};
  Write(content, path_, 1000);
  auto file = TokenFile::Open(path_);
  ASSERT_TRUE(file.ok());
  const std::string whole = *ReadFile(path_, 1 << 20, ExitCode::kData);
  std::string pattern(400, '\0');
  for (size_t i = 0; i < pattern.size(); i += 2) pattern[i] = 77;
  std::string damaged = whole;
  damaged[whole.find(pattern, whole.size() / 2) + 100] ^= 4;
  folder_.Write("x.h5", damaged);
  std::vector<int32_t> ids(200000);
  const absl::Status status = (*file)->Read(0, 200000, ids.data());
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kData);
  EXPECT_THAT(MessageOf(status), AllOf(HasSubstr(path_), HasSubstr("tokens at element 0")));
  // Other parts still read.
  EXPECT_TRUE((*file)->Read(0, 1000, ids.data()).ok());
  std::filesystem::resize_file(path_, whole.size() - 1000);
  EXPECT_THAT(MessageOf((*file)->Read(199000, 1000, ids.data())), HasSubstr("bytes while in use"));
}

TEST_F(TokenFileTest, InspectReportsDamage) {
  Content content;
  content.tokens[9] = 1000;
  Write(content, path_);
  const auto quick = InspectTokenFile(path_, false);
  ASSERT_TRUE(quick.ok());
  EXPECT_TRUE(quick->damage.ok());
  const auto thorough = InspectTokenFile(path_, true);
  ASSERT_TRUE(thorough.ok());
  EXPECT_EQ(ExitCodeOf(thorough->damage), ExitCode::kData);
  EXPECT_THAT(thorough->ToText(), HasSubstr("damaged       " + path_ + ": /tokens[9] is 1000"));
  EXPECT_THAT(thorough->ToJson(), HasSubstr("\"verified\": false"));
}

// Writes a token file with HDF5 itself, as other programs may; sound when `write_tokens`.
void WriteForeign(const std::string& path, uint64_t declared_tokens, hid_t tokens_properties,
                  bool write_tokens) {
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
  H5Pclose(access);
  ASSERT_GE(file, 0);
  const auto put = [&](const char* name, hid_t type, const void* value) {
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, type, value);
    H5Aclose(attribute);
    H5Sclose(space);
  };
  const hid_t text = H5Tcopy(H5T_C_S1);
  const int64_t version = 1, vocab_size = 300;
  const std::vector<uint64_t> starts = {0, 100, declared_tokens};
  std::vector<uint16_t> tokens(write_tokens ? declared_tokens : 0);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint16_t>(i % 300);
  ContentHash hash;
  hash.AddTokens(tokens.data(), tokens.size() * 2);
  hash.AddDocuments(starts);
  const std::string digest = hash.Finish("foreign", 300);
  put("format_version", H5T_STD_I64LE, &version);
  put("vocab_size", H5T_STD_I64LE, &vocab_size);
  H5Tset_size(text, 7);
  put("tokenizer", text, "foreign");
  H5Tset_size(text, 16);
  put("content_hash", text, digest.c_str());
  H5Tclose(text);
  const auto dataset = [&](const char* name, hid_t type, hsize_t n, hid_t properties,
                           const void* values) {
    const hid_t space = H5Screate_simple(1, &n, nullptr);
    const hid_t id = H5Dcreate2(file, name, type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
    ASSERT_GE(id, 0);
    if (values != nullptr) H5Dwrite(id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values);
    H5Dclose(id);
    H5Sclose(space);
  };
  dataset("documents", H5T_STD_U64LE, starts.size(), H5P_DEFAULT, starts.data());
  dataset("tokens", H5T_STD_U16LE, declared_tokens, tokens_properties,
          write_tokens ? tokens.data() : nullptr);
  ASSERT_GE(H5Fclose(file), 0);
}

hid_t Chunked(hsize_t chunk) {
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_chunk(properties, 1, &chunk);
  return properties;
}

TEST_F(TokenFileTest, FilesOfOtherWritersAreRead) {
  WriteForeign(path_, 5000, H5P_DEFAULT, true);
  EXPECT_TRUE(ReadAll(path_).ok()) << ReadAll(path_);
  WriteForeign(path_, 5000, Chunked(64), true);
  EXPECT_TRUE(ReadAll(path_).ok()) << ReadAll(path_);
}

TEST_F(TokenFileTest, HugeDeclaredSizesAreRefusedAtOnce) {
  rusage before, after;
  ASSERT_EQ(getrusage(RUSAGE_SELF, &before), 0);
  const auto start = std::chrono::steady_clock::now();
  WriteForeign(path_, uint64_t{1} << 50, H5P_DEFAULT, false);
  EXPECT_THAT(Fault(), HasSubstr("more than the file"));
  WriteForeign(path_, uint64_t{1} << 50, Chunked(1 << 20), false);
  EXPECT_THAT(Fault(), HasSubstr("more than the file"));
  const hid_t deflate = Chunked(1 << 20);
  H5Pset_deflate(deflate, 9);
  WriteForeign(path_, uint64_t{1} << 50, deflate, false);
  EXPECT_THAT(Fault(), HasSubstr("more than the file"));
  WriteForeign(path_, 1000, Chunked(1000), false);
  EXPECT_THAT(Fault(), HasSubstr("0 chunks are stored where 1"));
  const auto seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_LT(seconds, 1.0);
  ASSERT_EQ(getrusage(RUSAGE_SELF, &after), 0);
  EXPECT_LT(after.ru_maxrss - before.ru_maxrss, 64 << 10);  // KiB
}

// Random damage to files: an error of kData, or the content is what it was. `checksummed` files
// must also notice damage to the tokens without Verify.
void Fuzz(const std::string& path, bool checksummed, uint64_t seed, int rounds) {
  const std::string whole = *ReadFile(path, 1 << 20, ExitCode::kData);
  // Nothing stays open: HDF5 shares what it knows of a file with its later handles.
  std::vector<int32_t> expected;
  std::vector<uint64_t> expected_starts;
  std::string expected_tokenizer;
  int64_t expected_vocab_size = 0;
  {
    const std::unique_ptr<TokenFile> original = *TokenFile::Open(path);
    expected.resize(static_cast<size_t>(original->tokens()));
    ASSERT_TRUE(original->Read(0, original->tokens(), expected.data()).ok());
    expected_starts = original->document_table().All().value();
    expected_tokenizer = original->tokenizer();
    expected_vocab_size = original->vocab_size();
  }
  const auto tokens = static_cast<int64_t>(expected.size());
  int noticed = 0;
  for (int round = 0; round < rounds; ++round) {
    const RandomStream random(seed, RandomPurpose::kSynthetic, static_cast<uint64_t>(round));
    std::string mutated = whole;
    const uint32_t kind = random.Bits(0)[0] % 6;
    const uint32_t edits = kind < 3 ? 1 : 1 + random.Bits(0)[1] % 8;
    for (uint64_t k = 1; k <= edits; ++k) {
      const auto bits = random.Bits(k);
      const size_t at = bits[0] % mutated.size();
      if (kind < 4) {
        mutated[at] ^= static_cast<char>(1 << bits[1] % 8);
      } else if (kind == 4) {  // a run of one byte
        std::fill_n(mutated.begin() + static_cast<int64_t>(at),
                    std::min<size_t>(1 + bits[1] % 64, mutated.size() - at),
                    static_cast<char>(bits[2]));
      } else {  // a piece copied elsewhere
        const size_t from = bits[1] % mutated.size();
        const size_t length =
            std::min<size_t>(1 + bits[2] % 256, mutated.size() - std::max(at, from));
        mutated.replace(at, length, whole.substr(from, length));
      }
    }
    {
      auto file = File::OpenWrite(path, ExitCode::kCannotSave);
      ASSERT_TRUE(file.ok() && file->WriteAt(mutated.data(), mutated.size(), 0).ok());
    }
    auto file = TokenFile::Open(path);
    absl::Status status = file.status();
    std::vector<int32_t> ids(expected.size());
    if (file.ok() && (*file)->tokens() == tokens) {
      status = (*file)->Read(0, tokens, ids.data());
      if (checksummed && status.ok()) {
        ASSERT_EQ(ids, expected) << "round " << round;
      }
    }
    if (status.ok()) status = (*file)->Verify();
    if (status.ok()) {
      ASSERT_EQ(ids, expected) << "round " << round;
      ASSERT_EQ((*file)->document_table().All().value(), expected_starts) << "round " << round;
      ASSERT_EQ((*file)->vocab_size(), expected_vocab_size) << "round " << round;
      ASSERT_EQ((*file)->tokenizer(), expected_tokenizer) << "round " << round;
    } else {
      ASSERT_EQ(ExitCodeOf(status), ExitCode::kData) << status;
      ASSERT_THAT(MessageOf(status), HasSubstr(path));
      ++noticed;
    }
  }
  EXPECT_GT(noticed, rounds / 4);
}

TEST_F(TokenFileTest, FuzzOwnFormat) {
  Content content;
  content.tokens.clear();
  for (uint64_t i = 0; i < 3000; ++i) content.tokens.push_back(i * i % 1000);
  content.documents = {0, 10, 700, 2999, 3000};
  Write(content, path_, 500);
  Fuzz(path_, /*checksummed=*/true, 21, 1000);
}

TEST_F(TokenFileTest, FuzzFilesOfOtherWriters) {
  WriteForeign(path_, 2000, Chunked(256), true);
  Fuzz(path_, /*checksummed=*/false, 22, 500);
  WriteForeign(path_, 2000, H5P_DEFAULT, true);
  Fuzz(path_, /*checksummed=*/false, 23, 500);
}

}  // namespace
}  // namespace krait
