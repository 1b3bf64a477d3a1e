// Readers of files that others made, on mutations of sound ones: whatever comes, they answer with a
// status. `Long` goes on for 10 minutes each; both are meant for the sanitizers' build. What once
// broke a reader lies in tests/golden/fuzz and is read first.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "data/json_texts.h"
#include "data/token_file.h"
#include "data/tokenizer.h"
#include "kernels/base/clock.h"
#include "kernels/base/random.h"
#include "nlohmann/json.hpp"
#include "paths.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

constexpr double kShort = 3, kLong = 600;  // seconds

const std::string kGolden = std::string(KRAIT_TEST_GOLDEN) + "/";

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed, RandomPurpose::kSynthetic, 0) {}
  uint64_t Below(uint64_t limit) {
    const auto bits = random_.Bits(index_++);
    return limit == 0 ? 0 : (uint64_t{bits[0]} << 32 | bits[1]) % limit;
  }

 private:
  RandomStream random_;
  uint64_t index_ = 0;
};

// Some changes of bytes and runs of bytes.
std::string Mutated(std::string bytes, Draw* draw) {
  for (uint64_t changes = 1 + draw->Below(4); changes > 0 && !bytes.empty(); --changes) {
    const size_t at = draw->Below(bytes.size());
    const size_t size =
        std::min<size_t>(1 + draw->Below(draw->Below(2) == 0 ? 4 : 200), bytes.size() - at);
    switch (draw->Below(6)) {
      case 0:
        bytes[at] = static_cast<char>(draw->Below(256));
        break;
      case 1:
        bytes[at] ^= static_cast<char>(1 << draw->Below(8));
        break;
      case 2:
        bytes.erase(at, size);
        break;
      case 3:
        bytes.insert(draw->Below(bytes.size()), bytes.substr(at, size));
        break;
      case 4: {
        constexpr int64_t kValues[] = {0,         1,         -1,         INT32_MAX, INT32_MIN,
                                       INT64_MAX, INT64_MIN, UINT32_MAX, 255,       65536};
        const int64_t value = kValues[draw->Below(std::size(kValues))];
        const size_t width = std::min<size_t>(size_t{1} << draw->Below(4), bytes.size() - at);
        std::memcpy(bytes.data() + at, &value, width);
        break;
      }
      default:
        bytes.resize(at);
    }
  }
  return bytes;
}

// All values of a document, for replacing one by another.
void Collect(nlohmann::json* value, std::vector<nlohmann::json*>* all) {
  all->push_back(value);
  size_t count = 0;
  for (auto& member : *value) {
    if (value->is_structured() && ++count <= 40) Collect(&member, all);
  }
}

std::string MutatedJson(const std::string& text, Draw* draw) {
  nlohmann::json json = nlohmann::json::parse(text);
  for (uint64_t changes = 1 + draw->Below(3); changes > 0; --changes) {
    std::vector<nlohmann::json*> values;
    Collect(&json, &values);
    nlohmann::json* target = values[draw->Below(values.size())];
    const nlohmann::json other = *values[draw->Below(values.size())];
    const nlohmann::json simple[] = {nullptr,
                                     true,
                                     0,
                                     -1,
                                     1e300,
                                     INT64_MAX,
                                     "",
                                     "a",
                                     "\\",
                                     "(?i)[^\\S]+|(a",
                                     nlohmann::json::array(),
                                     nlohmann::json::object(),
                                     "Sequence",
                                     "ByteLevel",
                                     "Metaspace",
                                     "Split",
                                     "Replace",
                                     "Removed",
                                     "\xE2\x96\x81",
                                     "<0x41>"};
    switch (draw->Below(4)) {
      case 0:
        *target = other;
        break;
      case 1:
        *target = simple[draw->Below(std::size(simple))];
        break;
      case 2:
        if (target->is_string()) *target = std::string("[") + target->get<std::string>();
        break;
      default:
        if (target->is_object() && !target->empty()) {
          target->erase(
              std::next(target->begin(), static_cast<ptrdiff_t>(draw->Below(target->size()))));
        }
    }
  }
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

const std::string kText =
    "It's 12345 \xE6\x97\xA5\xE6\x9C\xAC\xF0\x9F\x98\x80  <|endoftext|> "
    "caf\xC3\xA9\r\n\t\xFF\xE2\x96\x81 z";

// Loads a tokenizer and, where that goes, uses it.
void UseTokenizer(const std::string& content, const char* name) {
  const auto made = MakeTokenizer(TokenizerFiles{{name, content}}, "fuzz");
  if (!made.ok()) return;
  const auto shared = (*made)->Share();
  std::vector<int32_t> ids;
  for (const std::string& text : {kText, std::string("abc"), std::string(300, 'x')}) {
    if (!shared->Encode(text, &ids).ok()) continue;
  }
  (void)DecodeAll(*shared, ids);
  for (const int32_t id : ids) ASSERT_LT(id, (*made)->vocab_size());
}

void FuzzTokenizerJson(double seconds) {
  std::vector<std::string> sound;
  for (const char* name : {"gpt2", "llama3", "qwen2", "nemo", "starcoder", "jamba", "metaspace"}) {
    sound.push_back(ReadAll(kGolden + "tokenizers/" + name + ".json"));
  }
  Draw draw(1);
  for (const double end = MonotonicSeconds() + seconds; MonotonicSeconds() < end;) {
    const std::string& text = sound[draw.Below(sound.size())];
    UseTokenizer(draw.Below(3) == 0 ? Mutated(text, &draw) : MutatedJson(text, &draw),
                 "tokenizer.json");
  }
}

void FuzzSentencePiece(double seconds) {
  std::vector<std::string> sound;
  for (const char* name : {"sp_bpe", "sp_unigram"}) {
    sound.push_back(ReadAll(kGolden + "tokenizers/" + name + ".model"));
  }
  Draw draw(2);
  for (const double end = MonotonicSeconds() + seconds; MonotonicSeconds() < end;) {
    UseTokenizer(Mutated(sound[draw.Below(sound.size())], &draw), "tokenizer.model");
  }
}

void FuzzIndex(double seconds) {
  const TempFolder folder;
  std::string index("MMIDIDX\0\0\1\0\0\0\0\0\0\0\x8", 18), ids(2000, 'x');
  const auto add = [&](auto value) {
    index.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  add(uint64_t{100});
  add(uint64_t{51});
  for (int i = 0; i < 100; ++i) add(int32_t{10});
  for (int i = 0; i < 100; ++i) add(int64_t{20 * i});
  for (int i = 0; i <= 50; ++i) add(int64_t{2 * i});
  std::string llmc(1024 + 2000, '\1');
  const int32_t head[] = {20240520, 1, 1000};
  std::memcpy(llmc.data(), head, sizeof(head));
  Draw draw(3);
  for (const double end = MonotonicSeconds() + seconds; MonotonicSeconds() < end;) {
    folder.Write("m.idx", draw.Below(4) > 0 ? Mutated(index, &draw) : index);
    folder.Write("m.bin", draw.Below(4) == 0 ? Mutated(ids, &draw) : ids);
    folder.Write("x.bin", Mutated(llmc, &draw));
    for (const char* name : {"m.idx", "x.bin"}) {
      const auto file = TokenFile::Open(folder / name);
      if (!file.ok()) continue;
      (void)(*file)->Verify();
      std::vector<int32_t> tokens(static_cast<size_t>((*file)->tokens())), starts(tokens.size());
      (void)(*file)->Read(0, (*file)->tokens(), tokens.data());
      (void)(*file)->DocumentStarts(0, (*file)->tokens(), starts.data());
    }
  }
}

void FuzzJsonLines(double seconds) {
  const TempFolder folder;
  std::string lines;
  for (int i = 0; i < 40; ++i) {
    lines += "{\"id\": " + std::to_string(i) + ", \"text\": \"a \\u00e9\\ud83d\\ude00 line\\n" +
             kText.substr(0, 40) + "\", \"meta\": {\"tags\": [1, 2.5e3, null, \"x\"]}}\n";
  }
  Draw draw(4);
  for (const double end = MonotonicSeconds() + seconds; MonotonicSeconds() < end;) {
    const std::string mutated = Mutated(lines, &draw);
    for (size_t at = 0; at < mutated.size();) {
      const size_t stop = std::min(mutated.find('\n', at), mutated.size());
      (void)TextOfLine(mutated.substr(at, stop - at), "line");
      at = stop + 1;
    }
    if (draw.Below(20) > 0) continue;
    for (const char* name : {"x.jsonl", "x.json"}) {
      BuildOptions options{.out = folder / "x.h5", .paths = {folder.Write(name, mutated)}};
      options.threads = 1;
      options.force = true;
      options.max_bad = 1000;
      const auto built = BuildTokenFile(options);
      if (built.ok()) {
        ASSERT_TRUE(TokenFile::Open(options.out).ok());
      }
    }
  }
}

TEST(FuzzTest, WhatOnceBrokeAReader) {
  for (const auto& entry : std::filesystem::directory_iterator(kGolden + "fuzz")) {
    const std::string name = entry.path().filename().string();
    SCOPED_TRACE(name);
    if (name.ends_with(".json")) UseTokenizer(ReadAll(entry.path()), "tokenizer.json");
    if (name.ends_with(".model")) UseTokenizer(ReadAll(entry.path()), "tokenizer.model");
    if (name.ends_with(".idx") || name.ends_with(".bin")) (void)TokenFile::Open(entry.path());
  }
}

TEST(FuzzTest, TokenizerJson) { FuzzTokenizerJson(kShort); }
TEST(FuzzTest, SentencePiece) { FuzzSentencePiece(kShort); }
TEST(FuzzTest, Index) { FuzzIndex(kShort); }
TEST(FuzzTest, JsonLines) { FuzzJsonLines(kShort); }
TEST(FuzzTest, LongTokenizerJson) { FuzzTokenizerJson(kLong); }
TEST(FuzzTest, LongSentencePiece) { FuzzSentencePiece(kLong); }
TEST(FuzzTest, LongIndex) { FuzzIndex(kLong); }
TEST(FuzzTest, LongJsonLines) { FuzzJsonLines(kLong); }

}  // namespace
}  // namespace krait
