#include "data/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>

#include "data/regex.h"
#include "kernels/base/random.h"
#include "nlohmann/json.hpp"
#include "paths.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kGolden = std::string(KRAIT_TEST_GOLDEN) + "/tokenizers/";

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

// Records of a u32 count and as many elements.
template <typename List>
std::vector<List> ReadLists(const std::string& path) {
  using Element = typename List::value_type;
  const std::string bytes = ReadAll(path);
  std::vector<List> lists;
  for (size_t at = 0; at < bytes.size();) {
    uint32_t count = 0;
    std::memcpy(&count, bytes.data() + at, 4);
    List list(count, Element());
    if (count > 0) std::memcpy(list.data(), bytes.data() + at + 4, count * sizeof(Element));
    at += 4 + count * sizeof(Element);
    lists.push_back(std::move(list));
  }
  return lists;
}

std::vector<std::string> Texts() { return ReadLists<std::string>(kGolden + "texts.bin"); }

std::unique_ptr<Tokenizer> Make(const std::string& path) {
  auto made = MakeTokenizer(path);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *std::move(made) : nullptr;
}

std::vector<int32_t> Encode(Tokenizer* tokenizer, std::string_view text) {
  std::vector<int32_t> ids;
  const absl::Status status = tokenizer->Encode(text, &ids);
  EXPECT_TRUE(status.ok()) << status;
  return ids;
}

class GoldenTokenizerTest : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenTokenizerTest, GivesTheLibrarysIds) {
  const std::string name = GetParam();
  const auto tokenizer = Make(kGolden + name);
  ASSERT_NE(tokenizer, nullptr);
  const auto shared = tokenizer->Share();
  const std::string stem = kGolden + name.substr(0, name.rfind('.'));
  const auto expected = ReadLists<std::vector<uint16_t>>(stem + ".ids");
  const std::vector<std::string> texts = Texts();
  ASSERT_EQ(expected.size(), texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::vector<int32_t> ids(expected[i].begin(), expected[i].end());
    EXPECT_EQ(Encode(tokenizer.get(), texts[i]), ids) << name << " of text " << i;
    EXPECT_EQ(Encode(shared.get(), texts[i]), ids);
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTokenizerTest,
                         ::testing::Values("gpt2.json", "llama3.json", "qwen2.json", "nemo.json",
                                           "starcoder.json", "jamba.json", "llama2.json",
                                           "metaspace.json", "sp_bpe.model", "sp_unigram.model"));

// The libraries put U+FFFD where bytes are no UTF-8; these texts have none.
TEST(TokenizerTest, DecodesAsTheLibraries) {
  for (const std::string name : {"jamba.json", "llama2.json", "sp_bpe.model", "sp_unigram.model"}) {
    const auto tokenizer = Make(kGolden + name);
    const std::string stem = kGolden + name.substr(0, name.rfind('.'));
    const auto ids = ReadLists<std::vector<uint16_t>>(stem + ".ids");
    const auto texts = ReadLists<std::string>(stem + ".txt");
    ASSERT_EQ(ids.size(), texts.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      EXPECT_EQ(DecodeAll(*tokenizer, {ids[i].begin(), ids[i].end()}), texts[i])
          << name << " of text " << i;
    }
  }
}

TEST(TokenizerTest, EveryByteStringComesBack) {
  const RandomStream random(1, RandomPurpose::kSynthetic, 0);
  for (const std::string name : {"bytes", "gpt2.json", "llama3.json", "nemo.json", "jamba.json"}) {
    const auto tokenizer = Make(name == "bytes" ? name : kGolden + name);
    uint64_t draw = 0;
    for (int i = 0; i < 300; ++i) {
      std::string text;
      const auto size = static_cast<size_t>(random.Uniform(draw++) * 200);
      while (text.size() < size) {
        const double kind = random.Uniform(draw++);
        const auto byte = static_cast<char>(static_cast<int>(random.Uniform(draw++) * 256));
        if (kind < 0.3) {
          text += byte;
        } else if (kind < 0.5) {
          text.append(3, ' ');
        } else if (kind < 0.6) {
          text += "\xE6\x97\xA5\xF0\x9F\x98\x80";
        } else {
          text += static_cast<char>('a' + (byte & 15));
        }
      }
      EXPECT_EQ(DecodeAll(*tokenizer, Encode(tokenizer.get(), text)), text) << name;
    }
    for (const std::string& text : Texts()) {
      if (name == "jamba.json" && text.find("\xE2\x96\x81") != std::string::npos) continue;
      EXPECT_EQ(DecodeAll(*tokenizer, Encode(tokenizer.get(), text)), text) << name;
    }
  }
}

// A character over several tokens, and SentencePiece's space at the start.
TEST(TokenizerTest, DecodesTokenByToken) {
  const auto jamba = Make(kGolden + "jamba.json");
  std::string bytes;
  for (const int32_t id : Encode(jamba.get(), "\xF0\x9F\xA6\x91"))
    bytes += jamba->Decode(id, false);
  EXPECT_EQ(bytes, "\xF0\x9F\xA6\x91");
  for (const std::string name : {"llama2.json", "sp_bpe.model"}) {
    const auto tokenizer = Make(kGolden + name);
    const std::vector<int32_t> ids = Encode(tokenizer.get(), "the");
    EXPECT_EQ(DecodeAll(*tokenizer, ids), "the") << name;
    EXPECT_EQ(tokenizer->Decode(ids.front(), /*at_start=*/false).front(), ' ') << name;
    EXPECT_EQ(tokenizer->Decode(-1, true), "");
    TextDecoder decoder(*tokenizer);
    for (const int32_t id : tokenizer->prefix()) EXPECT_EQ(decoder.Next(id), "") << name;
    EXPECT_EQ(decoder.Next(ids.front()).front(), 't') << name;
    EXPECT_EQ(decoder.Next(ids.front()).front(), ' ') << name;
    EXPECT_EQ(tokenizer->Decode(1 << 30, true), "");
  }
}

TEST(TokenizerTest, SpecialTokens) {
  const auto llama = Make(kGolden + "llama3.json");
  EXPECT_EQ(llama->end_token(), 1);
  EXPECT_THAT(llama->prefix(), ElementsAre(0));
  EXPECT_TRUE(llama->suffix().empty());
  EXPECT_EQ(llama->vocab_size(), 700);
  EXPECT_THAT(llama->name(), HasSubstr("bpe-"));
  EXPECT_EQ(Encode(llama.get(), "<|end_of_text|>"), std::vector<int32_t>{1});
  const auto sentencepiece = Make(kGolden + "sp_bpe.model");
  EXPECT_EQ(sentencepiece->end_token(), 2);
  EXPECT_THAT(sentencepiece->prefix(), ElementsAre(1));
  EXPECT_EQ(Make("bytes")->end_token(), std::nullopt);
}

// Ids of tokenizers 0.23.3.
TEST(TokenizerTest, WhiteSpaceThatATokenTakesAlongMayBeATokenToo) {
  auto json = nlohmann::json::parse(ReadAll(kGolden + "gpt2.json"));
  const auto add = [&](int id, const char* content, bool lstrip, bool rstrip) {
    json["added_tokens"].push_back({{"id", id},
                                    {"content", content},
                                    {"single_word", false},
                                    {"lstrip", lstrip},
                                    {"rstrip", rstrip},
                                    {"normalized", false},
                                    {"special", false}});
  };
  add(700, "<x>", false, true);
  add(701, "  ", false, false);
  add(702, " !", true, true);
  add(703, "\t", true, true);
  const TempFolder folder;
  folder.Write("tokenizer.json", json.dump());
  const auto tokenizer = Make(folder / "tokenizer.json");
  ASSERT_NE(tokenizer, nullptr);
  const auto ids = [&](const char* text) { return Encode(tokenizer.get(), text); };
  EXPECT_THAT(ids("<x>   a"), ElementsAre(700, 701, 436));
  EXPECT_THAT(ids("<x>     a"), ElementsAre(700, 701, 701, 436));
  EXPECT_THAT(ids("<x>  !"), ElementsAre(700, 701, 1));
  EXPECT_THAT(ids("\t\t\ta"), ElementsAre(703, 65));
  EXPECT_THAT(ids("<x>  \t  b"), ElementsAre(700, 701, 703, 701, 66));
}

TEST(TokenizerTest, TheFolderSaysTheEndToken) {
  const TempFolder folder;
  folder.Write("tokenizer.json", ReadAll(kGolden + "qwen2.json"));
  EXPECT_EQ(Make(folder.path())->end_token(), 0);
  folder.Write("special_tokens_map.json", R"({"eos_token": {"content": "<|im_start|>"}})");
  EXPECT_EQ(Make(folder.path())->end_token(), 1);
  folder.Write("tokenizer_config.json", R"({"eos_token": "<|im_end|>"})");
  EXPECT_EQ(Make(folder.path())->end_token(), 2);
  EXPECT_EQ(Make(folder / "tokenizer.json")->end_token(), 2);
  folder.Write("tokenizer_config.json", R"({"eos_token": "<none>"})");
  const auto made = MakeTokenizer(folder.path());
  EXPECT_EQ(ExitCodeOf(made.status()), ExitCode::kData);
  EXPECT_THAT(MessageOf(made.status()),
              HasSubstr("the end token \"<none>\" that tokenizer_config.json names is no token"));
}

TEST(TokenizerTest, TheFolderSaysWhetherASentencePieceModelsStartTokenIsPut) {
  const TempFolder folder;
  folder.Write("tokenizer.model", ReadAll(kGolden + "sp_bpe.model"));
  folder.Write("tokenizer_config.json", R"({"add_bos_token": true})");
  EXPECT_THAT(Make(folder.path())->prefix(), ElementsAre(1));
  folder.Write("tokenizer_config.json", R"({"add_bos_token": false, "eos_token": "</s>"})");
  const auto without = Make(folder.path());
  EXPECT_TRUE(without->prefix().empty() && without->Share()->prefix().empty());
  EXPECT_EQ(without->end_token(), 2);
  folder.Write("tokenizer_config.json", R"({"add_bos_token": "no"})");
  EXPECT_THAT(MessageOf(MakeTokenizer(folder.path()).status()),
              HasSubstr("tokenizer_config.json: add_bos_token is neither true nor false"));
}

// The name is that of the ids, not of the file's layout or what stands beside it.
TEST(TokenizerTest, TheNameIsOfTheContent) {
  const TempFolder folder;
  const auto json = nlohmann::json::parse(ReadAll(kGolden + "llama3.json"));
  auto changed = json;
  changed["post_processor"] = nullptr;
  changed["truncation"] = {{"max_length", 5}};
  const std::string name = Make(kGolden + "llama3.json")->name();
  EXPECT_EQ(Make(folder.Write("a.json", changed.dump(3)))->name(), name);
  changed["model"]["ignore_merges"] = false;
  EXPECT_NE(Make(folder.Write("b.json", changed.dump(3)))->name(), name);
}

std::string Fault(const std::string& content, ExitCode code) {
  const TempFolder folder;
  const auto made = MakeTokenizer(folder.Write("tokenizer.json", content));
  EXPECT_FALSE(made.ok());
  EXPECT_EQ(ExitCodeOf(made.status()), code) << made.status();
  const std::string message = MessageOf(made.status());
  EXPECT_THAT(message, HasSubstr("tokenizer.json"));
  return message;
}

TEST(TokenizerTest, WhatIsNotSupportedIsRefusedByName) {
  const auto json = nlohmann::json::parse(ReadAll(kGolden + "llama3.json"));
  const auto fault = [&](const char* pointer, const nlohmann::json& value) {
    auto changed = json;
    changed[nlohmann::json::json_pointer(pointer)] = value;
    return Fault(changed.dump(), ExitCode::kConfig);
  };
  EXPECT_THAT(fault("/model/type", "WordPiece"), HasSubstr("model: the model \"WordPiece\""));
  EXPECT_THAT(fault("/model/type", "Unigram"), HasSubstr("name that) is not supported"));
  EXPECT_THAT(fault("/model/dropout", 0.1), HasSubstr("model.dropout: a dropout"));
  EXPECT_THAT(fault("/model/end_of_word_suffix", "</w>"), HasSubstr("model.end_of_word_suffix"));
  EXPECT_THAT(fault("/normalizer", {{"type", "Lowercase"}}),
              HasSubstr("normalizer: the normalizer \"Lowercase\""));
  EXPECT_THAT(fault("/pre_tokenizer", {{"type", "Whitespace"}}),
              HasSubstr("pre_tokenizer: the pre-tokenizer \"Whitespace\""));
  EXPECT_THAT(fault("/pre_tokenizer/pretokenizers/1", {{"type", "Punctuation"}}),
              HasSubstr("pre_tokenizer.pretokenizers[1]: the pre-tokenizer \"Punctuation\""));
  EXPECT_THAT(fault("/pre_tokenizer/pretokenizers/0/pattern/Regex", "\\h+"),
              HasSubstr("pretokenizers[0].pattern: \\h at byte 0 of the pattern"));
  EXPECT_THAT(fault("/pre_tokenizer/pretokenizers/0/new", 1), HasSubstr("the key \"new\""));
  EXPECT_THAT(fault("/decoder", {{"type", "WordPiece"}}), HasSubstr("decoder: the decoder"));
  EXPECT_THAT(fault("/post_processor", {{"type", "RobertaProcessing"}}),
              HasSubstr("post_processor: the post-processor \"RobertaProcessing\""));
  EXPECT_THAT(fault("/added_tokens/0/single_word", true), HasSubstr("added_tokens[0].single_word"));
  EXPECT_THAT(fault("/pre_tokenizer", nullptr), HasSubstr("without byte_fallback"));
}

TEST(TokenizerTest, BrokenFilesAreNamedWithTheirPlace) {
  const auto json = nlohmann::json::parse(ReadAll(kGolden + "llama3.json"));
  const auto fault = [&](const char* pointer, const nlohmann::json& value) {
    auto changed = json;
    changed[nlohmann::json::json_pointer(pointer)] = value;
    return Fault(changed.dump(), ExitCode::kData);
  };
  EXPECT_THAT(Fault("{\"model\": ", ExitCode::kData), HasSubstr("byte"));
  EXPECT_THAT(Fault("{}", ExitCode::kData), HasSubstr("model is missing; an object is needed"));
  EXPECT_THAT(fault("/model/merges/3", "a"), HasSubstr("model.merges[3] is string; a pair"));
  EXPECT_THAT(fault("/model/merges/3", {"zzz", "a"}), HasSubstr("model.merges[3]"));
  EXPECT_THAT(fault("/model/vocab/a", -1), HasSubstr("vocab[\"a\"] is number"));
  EXPECT_THAT(fault("/model/vocab/a", 5), HasSubstr("the id 5 is that of two tokens"));
  EXPECT_THAT(fault("/model/vocab/a", 1 << 30), HasSubstr("the id 1073741824 is above"));
  EXPECT_THAT(fault("/added_tokens/0/id", 44), HasSubstr("has the id 44 here and 0 in"));
  EXPECT_THAT(fault("/added_tokens/0/content", ""), HasSubstr("added_tokens[0].content"));
  EXPECT_THAT(fault("/pre_tokenizer/pretokenizers/0/pattern/Regex", "(a"),
              HasSubstr("the pattern (a cannot be read"));
}

TEST(TokenizerTest, WhatIsNoTokenizer) {
  const TempFolder folder;
  const auto fault = [](const std::string& path, ExitCode code) {
    const auto made = MakeTokenizer(path);
    EXPECT_EQ(ExitCodeOf(made.status()), code) << made.status();
    return MessageOf(made.status());
  };
  EXPECT_THAT(fault("words", ExitCode::kConfig),
              AllOf(HasSubstr("tokenizer words: there is no such file"), HasSubstr("\"bytes\"")));
  EXPECT_THAT(fault(folder.path(), ExitCode::kConfig),
              HasSubstr("a folder without tokenizer.json"));
  EXPECT_THAT(fault(folder.Write("a.txt", "hello"), ExitCode::kConfig), HasSubstr("neither"));
  EXPECT_THAT(fault(folder.Write("a.model", "\nhello"), ExitCode::kData),
              HasSubstr("a.model is no SentencePiece model"));
}

TEST(TokenizerTest, ABrokenByteNamesItself) {
  auto json = nlohmann::json::parse(ReadAll(kGolden + "gpt2.json"));
  json["model"]["merges"] = nlohmann::json::array();
  json["model"]["vocab"].erase("\xC3\xBF");  // of the byte 0xFF
  const TempFolder folder;
  const auto tokenizer = Make(folder.Write("tokenizer.json", json.dump()));
  std::vector<int32_t> ids;
  EXPECT_EQ(MessageOf(tokenizer->Encode("a\xFF", &ids)),
            "the tokenizer has no token for the byte 0xFF");
  const auto sentencepiece = Make(kGolden + "sp_bpe.model");
  EXPECT_THAT(MessageOf(sentencepiece->Encode("ab\xFF", &ids)), HasSubstr("byte 2 of the text"));
}

TEST(TokenizerTest, RunsOfOneCharacterAreQuick) {
  for (const std::string name : {"gpt2.json", "llama3.json", "nemo.json", "jamba.json"}) {
    const auto tokenizer = Make(kGolden + name);
    for (const std::string unit : {"a", " ", "\n", "ab ", "\xE4\xB8\x80", "\xFF", "'"}) {
      std::string text;
      while (text.size() < (1 << 19)) text += unit;
      EXPECT_EQ(DecodeAll(*tokenizer, Encode(tokenizer.get(), text)), text) << name;
    }
  }
}

TEST(RegexTest, TranslatesOnigurumasSyntax) {
  const auto translate = [](const char* pattern) {
    const auto text = TranslatePattern(pattern, "p");
    return text.ok() ? *text : MessageOf(text.status());
  };
  EXPECT_EQ(translate("(?i:'s)|\\p{L}+ ?[^\\r\\n\\p{N}]"), "(?i:'s)|\\p{L}+ ?[^\\r\\n\\p{N}]");
  EXPECT_EQ(translate("\\s+(?!\\S)"), "[\\t-\\r\\x{85}\\p{Z}]+(?![^\\t-\\r\\x{85}\\p{Z}])");
  EXPECT_EQ(translate("\\p{Han}\\p{^Lu}a{,3}\\u3040"), "\\p{sc:Han}\\P{Lu}a{0,3}\\x{3040}");
  // Alone it has the small numbers and fractions of Latin-1, too.
  EXPECT_EQ(translate("\\w[\\w]"),
            "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}]"
            "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}]");
  for (const char* pattern : {"\\b", "[a[b]]", "[a&&b]", "a{1,3}+", "a(?i)b", "\\R", "(a)\\1",
                              "[[:alpha:]]", "\\p{Alpha}", "[\\W]", "(?<n>a)"}) {
    EXPECT_THAT(translate(pattern), HasSubstr("is not supported")) << pattern;
  }
  EXPECT_THAT(translate("[a"), HasSubstr("a class has no end"));
  EXPECT_THAT(MessageOf(Regex::Compile("a*", "p").status()), HasSubstr("matches the empty text"));
}

}  // namespace
}  // namespace krait
