#include "data/foreign_tokens.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "data/inspect.h"
#include "data/sampler.h"
#include "data/token_file.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename T>
void Add(std::string* bytes, std::initializer_list<T> values) {
  for (const T value : values) bytes->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

// Two documents, the first of two sequences; an empty one between them.
struct Megatron {
  std::string index = std::string("MMIDIDX\0\0", 9);
  std::string ids;
  Megatron() {
    Add<uint64_t>(&index, {1});
    Add<uint8_t>(&index, {8});
    Add<uint64_t>(&index, {3, 4});
    Add<int32_t>(&index, {2, 3, 4});
    Add<int64_t>(&index, {0, 4, 10});
    Add<int64_t>(&index, {0, 2, 2, 3});
    Add<uint16_t>(&ids, {1, 2, 3, 4, 5, 60, 7, 8, 9});
  }
  std::string Write(const TempFolder& folder, const std::string& name) const {
    folder.Write(name + ".idx", index);
    return folder.Write(name + ".bin", ids);
  }
};

std::string Llmc(bool small) {
  std::string bytes;
  Add<int32_t>(&bytes, {small ? 20240520 : 20240801, small ? 1 : 7, 5});
  bytes.resize(1024);
  if (small) {
    Add<uint16_t>(&bytes, {50256, 1, 2, 50256, 3});
  } else {
    Add<uint32_t>(&bytes, {128000, 1, 2, 128000, 3});
  }
  return bytes;
}

std::vector<int32_t> Ids(const TokenFile& file) {
  std::vector<int32_t> ids(static_cast<size_t>(file.tokens()));
  EXPECT_TRUE(file.Read(0, file.tokens(), ids.data()).ok());
  return ids;
}

TEST(ForeignTokensTest, ReadsMegatron) {
  const TempFolder folder;
  const std::string bin = Megatron().Write(folder, "m");
  for (const std::string& path : {bin, folder / "m.idx"}) {
    const auto file = TokenFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ((*file)->format(), "Megatron");
    EXPECT_EQ((*file)->dtype(), DType::kU16);
    EXPECT_THAT((*file)->document_table().All().value(), ElementsAre(0, 5, 9));
    EXPECT_THAT(Ids(**file), ElementsAre(1, 2, 3, 4, 5, 60, 7, 8, 9));
    EXPECT_TRUE((*file)->Verify().ok());
    EXPECT_EQ((*file)->vocab_size(), 0);
    EXPECT_EQ((*file)->tokenizer(), "");
  }
}

// Documents that are read from the index when they are asked for: of one to four sequences.
TEST(ForeignTokensTest, ReadsManyDocumentsOfMegatron) {
  const TempFolder folder;
  for (const int64_t bounds : {2, 4096, 4097, 9000, 70'000}) {
    for (const bool empty : {false, true}) {
      SCOPED_TRACE(bounds);
      std::vector<int32_t> lengths;
      std::vector<int64_t> places, documents = {0};
      std::vector<uint64_t> starts = {0};
      int64_t tokens = 0;
      for (int64_t d = 1; d < bounds; ++d) {
        const bool without = empty && d % 7 == 3;
        for (int64_t s = 0; s < (without ? 0 : 1 + d % 4); ++s) {
          lengths.push_back(static_cast<int32_t>(1 + (d + s) % 5));
          places.push_back(2 * tokens);
          tokens += lengths.back();
        }
        documents.push_back(static_cast<int64_t>(lengths.size()));
        if (!without) starts.push_back(static_cast<uint64_t>(tokens));
      }
      Megatron file;
      file.index.resize(9 + 8 + 1);
      Add<uint64_t>(&file.index, {lengths.size(), documents.size()});
      const auto put = [&](const auto& values) {
        file.index.append(reinterpret_cast<const char*>(values.data()),
                          values.size() * sizeof(values[0]));
      };
      put(lengths);
      put(places);
      put(documents);
      file.ids.assign(static_cast<size_t>(2 * tokens), '\1');
      const auto opened = TokenFile::Open(file.Write(folder, "m"));
      ASSERT_TRUE(opened.ok()) << opened.status();
      EXPECT_EQ((*opened)->tokens(), tokens);
      EXPECT_EQ((*opened)->document_table().All().value(), starts);
      std::vector<uint64_t> found;
      const int64_t middle = tokens / 2;
      ASSERT_TRUE((*opened)->document_table().Within(middle, tokens, &found).ok());
      const auto first = std::upper_bound(starts.begin(), starts.end(), middle);
      EXPECT_EQ(found, std::vector<uint64_t>(first, starts.end() - 1));
    }
  }
}

TEST(ForeignTokensTest, ReadsLlmc) {
  const TempFolder folder;
  for (const bool small : {true, false}) {
    const auto file = TokenFile::Open(folder.Write("x.bin", Llmc(small)));
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ((*file)->format(), "llm.c");
    EXPECT_THAT((*file)->document_table().All().value(), ElementsAre(0, 3, 5));
    const int32_t end = small ? 50256 : 128000;
    EXPECT_THAT(Ids(**file), ElementsAre(end, 1, 2, end, 3));
    EXPECT_EQ((*file)->vocab_size(), end + 1);
    const auto summary = InspectTokenFile(folder / "x.bin", true);
    ASSERT_TRUE(summary.ok());
    EXPECT_THAT(summary->ToText(), HasSubstr("format        llm.c"));
    EXPECT_THAT(summary->ToText(), HasSubstr("tokenizer     not known (vocabulary"));
  }
}

TEST(ForeignTokensTest, ARunMixesThem) {
  const TempFolder folder;
  const std::string text = folder.Write("a.txt", "some text of bytes");
  ASSERT_TRUE(BuildTokenFile({.out = folder / "a.h5", .paths = {text}}).ok());
  const std::vector<SourceSpec> sources = {{.path = Megatron().Write(folder, "m"), .weight = 2},
                                           {.path = folder / "a.h5", .weight = 1}};
  const auto data = Dataset::Open(sources, 4, 256, 1, true);
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ((*data)->tokenizer(), "bytes");
  TokenBatch batch;
  ASSERT_TRUE((*data)->ReadTraining(0, 3, &batch).ok());
  int foreign = 0;
  for (int64_t q = 0; q < 3; ++q) foreign += (*data)->At(q).source == 0 ? 1 : 0;
  EXPECT_EQ(foreign, 2);
  // An id above the model's vocabulary is found when it is read.
  const auto small = Dataset::Open({{.path = folder / "m.bin"}}, 4, 50, 1, true);
  ASSERT_TRUE(small.ok());
  EXPECT_THAT(MessageOf((*small)->ReadStored(1, 1, &batch)),
              HasSubstr("m.bin: /tokens[5] is 60; ids are below vocab_size 50"));
}

std::string FaultOf(const std::string& path) {
  const auto file = TokenFile::Open(path);
  EXPECT_FALSE(file.ok());
  EXPECT_EQ(ExitCodeOf(file.status()), ExitCode::kData) << file.status();
  return MessageOf(file.status());
}

TEST(ForeignTokensTest, BrokenFilesAreNamedWithTheirPlace) {
  const TempFolder folder;
  const auto fault = [&](const auto& change) {
    Megatron file;
    change(&file);
    return FaultOf(file.Write(folder, "m"));
  };
  const auto put = [](std::string* bytes, size_t at, int64_t value, size_t size) {
    bytes->replace(at, size, reinterpret_cast<const char*>(&value), size);
  };
  EXPECT_THAT(fault([](Megatron* m) { m->index[0] = 'x'; }), HasSubstr("m.idx: no index of"));
  EXPECT_THAT(fault([&](Megatron* m) { put(&m->index, 9, 2, 8); }), HasSubstr("version 2"));
  EXPECT_THAT(fault([](Megatron* m) { m->index[17] = 7; }), HasSubstr("type code 7"));
  EXPECT_THAT(fault([](Megatron* m) { m->index.resize(20); }), HasSubstr("within its head"));
  EXPECT_THAT(fault([](Megatron* m) { m->index.pop_back(); }), HasSubstr("do not hold the 3"));
  EXPECT_THAT(fault([&](Megatron* m) { put(&m->index, 18, -1, 8); }), HasSubstr("do not hold"));
  EXPECT_THAT(fault([&](Megatron* m) { put(&m->index, 34, -5, 4); }), HasSubstr("sequence 0: -5"));
  EXPECT_THAT(fault([&](Megatron* m) { put(&m->index, 54, 2, 8); }),
              HasSubstr("sequence 1: 3 ids"));
  EXPECT_THAT(fault([&](Megatron* m) { put(&m->index, 70 + 8, 9, 8); }),
              HasSubstr("document 1 begins after the last sequence"));
  EXPECT_THAT(fault([&](Megatron* m) { put(&m->index, 70 + 16, 0, 8); }),
              HasSubstr("document 2 begins at sequence 0"));
  EXPECT_THAT(fault([](Megatron* m) { m->ids.resize(10); }), HasSubstr("m.bin: 10 bytes are less"));
  EXPECT_THAT(fault([](Megatron* m) { m->ids += "xx"; }), HasSubstr("20 bytes where the index"));
  std::filesystem::remove(folder / "m.bin");
  EXPECT_THAT(FaultOf(folder / "m.idx"), HasSubstr("m.bin: No such file"));

  // As Megatron's own tools name it.
  EXPECT_THAT(FaultOf(folder / "m"), HasSubstr("named with its ending: " + (folder / "m.bin")));

  EXPECT_THAT(FaultOf(folder.Write("x.bin", "short")), HasSubstr("neither a file of llm.c"));
  EXPECT_THAT(FaultOf(folder.Write("x.bin", std::string(2000, 'x'))), HasSubstr("neither a file"));
  EXPECT_THAT(FaultOf(folder.Write("x.bin", Llmc(true) + "x")),
              HasSubstr("1035 bytes do not hold"));
  std::string other = Llmc(true);
  other[4] = 9;
  EXPECT_THAT(FaultOf(folder.Write("x.bin", other)), HasSubstr("version 9"));
  Add<int32_t>(&(other = ""), {20240520, 1, 0});
  other.resize(1024);
  EXPECT_THAT(FaultOf(folder.Write("x.bin", other)), HasSubstr("holds no ids"));
}

}  // namespace
}  // namespace krait
