#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <thread>

#include "data/inspect.h"
#include "data/line_reader.h"
#include "data/token_file.h"
#include "kernels/base/file.h"
#include "kernels/base/random.h"
#include "kernels/base/stop_signals.h"
#include "nlohmann/json.hpp"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

std::string Gzip(const std::string& text) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string Zstd(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
  const size_t size = ZSTD_compress2(context, out.data(), out.size(), text.data(), text.size());
  EXPECT_FALSE(ZSTD_isError(size));
  ZSTD_freeCCtx(context);
  out.resize(size);
  return out;
}

class BuildTest : public ::testing::Test {
 protected:
  absl::StatusOr<BuildReport> Build(const std::vector<std::string>& paths, uint64_t seed = 1) {
    return BuildTokenFile(
        {.tokenizer = "bytes", .out = out_, .paths = paths, .seed = seed, .force = true});
  }
  // The documents of the token file, in stored order; it must be sound.
  std::vector<std::string> Documents() {
    const auto file = TokenFile::Open(out_);
    EXPECT_TRUE(file.ok()) << file.status();
    if (!file.ok()) return {};
    EXPECT_TRUE((*file)->Verify().ok()) << (*file)->Verify();
    std::vector<int32_t> ids(static_cast<size_t>((*file)->tokens()));
    EXPECT_TRUE((*file)->Read(0, (*file)->tokens(), ids.data()).ok());
    std::vector<std::string> documents;
    const auto starts = (*file)->document_table().All().value();
    for (size_t i = 1; i < starts.size(); ++i) {
      std::string text;
      for (size_t k = starts[i - 1]; k < starts[i]; ++k) text += static_cast<char>(ids[k]);
      documents.push_back(std::move(text));
    }
    return documents;
  }
  // Builds, expects an error of `code` that leaves nothing behind, and returns its message.
  std::string Fault(const std::vector<std::string>& paths, ExitCode code = ExitCode::kData) {
    const auto report = Build(paths);
    EXPECT_FALSE(report.ok());
    EXPECT_EQ(ExitCodeOf(report.status()), code) << report.status();
    EXPECT_FALSE(Exists(out_));
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
      const std::string name = entry.path().filename().string();
      EXPECT_FALSE(name.ends_with(".tmp") || name.ends_with(".spool")) << name;
    }
    return MessageOf(report.status());
  }

  TempFolder folder_;
  const std::string out_ = folder_ / "out.h5";
};

TEST_F(BuildTest, TextFilesBecomeDocuments) {
  std::string bytes;  // every byte but NUL
  for (int i = 1; i < 256; ++i) bytes += static_cast<char>(i);
  const auto report = Build({folder_.Write("a.txt", "alpha"), folder_.Write("b", bytes)});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->documents, 2);
  EXPECT_EQ(report->tokens, 5 + 255);
  EXPECT_EQ(report->files, 2);
  EXPECT_EQ(report->skipped_files, 0);
  EXPECT_THAT(Documents(), UnorderedElementsAre("alpha", bytes));
  const auto file = TokenFile::Open(out_);
  EXPECT_EQ((*file)->tokenizer(), "bytes");
  EXPECT_EQ((*file)->vocab_size(), 256);
  EXPECT_EQ((*file)->dtype(), DType::kU8);
}

// At once, and in the midst of the work.
TEST_F(BuildTest, ARequestToStopLeavesNothing) {
  folder_.Write("in/a.txt", "alpha");
  std::string lines;
  while (lines.size() < (32 << 20)) lines += "{\"text\": \"a line\"}\n";
  folder_.Write("long.jsonl", lines);
  for (const std::string name : {"in", "long.jsonl"}) {
    const StopSignals signals("stopping");
    std::thread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(name == "in" ? 0 : 300));
      kill(getpid(), SIGTERM);
    });
    if (name == "in") later.join();
    EXPECT_EQ(Fault({folder_ / name}, ExitCode::kStopped),
              "stopped on request: " + out_ + " was not written");
    if (later.joinable()) later.join();
  }
}

TEST_F(BuildTest, FoldersAreReadRecursively) {
  folder_.Write("in/b.txt", "bee");
  folder_.Write("in/a/deep/c.txt", "see");
  folder_.Write("in/a/lines.jsonl", "{\"text\": \"line\"}\n");
  folder_.Write("in/empty", "");
  folder_.Write("in/empty.jsonl", "\n");
  folder_.Write("in/binary", std::string("ab\0c", 4));
  folder_.Write("in/.git/config", "hidden");
  folder_.Write("in/a/.b.txt.swp", "hidden");
  const auto report = Build({folder_ / "in"});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->files, 3);
  EXPECT_EQ(report->skipped_files, 3);
  EXPECT_EQ(report->hidden, 2);
  EXPECT_THAT(Documents(), UnorderedElementsAre("bee", "see", "line"));
}

TEST_F(BuildTest, LinksInFoldersAreFollowedAndNothingIsReadTwice) {
  const auto link = [&](const std::string& to, const std::string& name) {
    std::filesystem::create_symlink(to, folder_ / name);
  };
  folder_.Write("in/own.txt", "own");
  folder_.Write("in/sub/leaf.txt", "leaf");
  link(folder_.Write("blobs/1a", "blob"), "in/blob.txt");
  folder_.Write("tree/x.txt", "outside");
  link(folder_ / "tree", "in/tree");
  link(folder_ / "blobs/1a", "in/sub/again.txt");  // a second link to one file
  link("own.txt", "in/alias.txt");                 // a file that is read under its own name
  link("..", "in/sub/up");                         // a loop
  link("sub", "in/sub2");                          // a folder gone through
  link("nowhere", "in/dangling");
  link("self", "in/self");
  const auto report = Build({folder_ / "in"});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Documents(), UnorderedElementsAre("own", "leaf", "blob", "outside"));
  EXPECT_EQ(report->files, 4);
  EXPECT_EQ(report->linked_files, 1);
  EXPECT_EQ(report->repeated_files, 2);
  EXPECT_EQ(report->repeated_folders, 2);
  EXPECT_EQ(report->skipped_files, 2);
}

TEST_F(BuildTest, JsonFilesHoldRecords) {
  const std::string list =
      "[{\"text\": \"a\", \"n\": [1, {\"text\": \"no\"}]},\n {\"text\": \"b\"}]";
  const auto report = Build(
      {folder_.Write("list.json", list), folder_.Write("Lines.JSONL", "{\"text\": \"c\"}\n"),
       folder_.Write("lines.json", "{\"text\": \"d\"}\n{\"text\": \"\"}\n{\"text\": \"e\"}\n"),
       folder_.Write("pretty.json", "{\n  \"id\": 1,\n  \"text\": \"f\"\n}\n"),
       folder_.Write("packed.json.gz", Gzip(list)), folder_.Write("P.JSON.ZST", Zstd(list))});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->files, 6);
  EXPECT_EQ(report->skipped_documents, 1);
  EXPECT_THAT(Documents(), UnorderedElementsAre("a", "b", "c", "d", "e", "f", "a", "b", "a", "b"));
}

TEST_F(BuildTest, JsonFilesThatAreNoRecords) {
  const auto fault = [&](const std::string& text) {
    std::filesystem::remove(out_);
    return Fault({folder_.Write("x.json", text)});
  };
  EXPECT_THAT(fault("[{\"text\": \"a\"}, {\"title\": \"b\"}]"),
              HasSubstr("x.json at byte 30: the field \"text\" is missing"));
  EXPECT_THAT(fault("{\"text\": \"a\"}\n{\"text\": 7}"), HasSubstr("is not a string"));
  EXPECT_THAT(fault("[1, 2]"), HasSubstr("an object with a string \"text\" is needed"));
  EXPECT_THAT(fault("[[{\"text\": \"a\"}]]"), HasSubstr("an object with a string"));
  EXPECT_THAT(fault("\"text\""), HasSubstr("an object with a string"));
  EXPECT_THAT(fault("{\"text\": \"a\"}\n{\"text\": oops}"),
              HasSubstr("x.json at byte 24: not JSON"));
  EXPECT_THAT(fault("[{\"text\": \"a\"}"), HasSubstr("not JSON"));
  EXPECT_THAT(fault(" \n"), HasSubstr("holds no text"));
  std::filesystem::remove(folder_ / "x.json");
  // In a folder of anything such a file is a text, but a broken set of records is none.
  folder_.Write("in/package.json", "{\"name\": \"x\"}");
  folder_.Write("in/records.json", "[{\"text\": \"r\"}]");
  const auto report = Build({folder_ / "in"});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->plain_json_files, 1);
  EXPECT_THAT(Documents(), UnorderedElementsAre("{\"name\": \"x\"}", "r"));
  std::filesystem::remove(out_);
  folder_.Write("in/records.json", "[{\"text\": \"r\"}, {\"text\": 1}]");
  EXPECT_THAT(Fault({folder_ / "in"}), HasSubstr("records.json at byte"));
}

TEST_F(BuildTest, ZstandardWindowsOfTwoGiB) {
  // As zstd --ultra --long=31 writes them, for any length.
  const std::string line = "{\"text\": \"far\"}\n";
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_windowLog, 28);  // 27 is what decoders take by default
  ZSTD_CCtx_setParameter(context, ZSTD_c_strategy, ZSTD_fast);
  std::string packed(1000, '\0');
  ZSTD_inBuffer in = {line.data(), line.size(), 0};
  ZSTD_outBuffer out = {packed.data(), packed.size(), 0};
  // Continued, so that the frame cannot know its size and states its window.
  ASSERT_FALSE(ZSTD_isError(ZSTD_compressStream2(context, &out, &in, ZSTD_e_flush)));
  ASSERT_EQ(ZSTD_compressStream2(context, &out, &in, ZSTD_e_end), 0u);
  ZSTD_freeCCtx(context);
  packed.resize(out.pos);
  const auto report = Build({folder_.Write("x.jsonl.zst", packed)});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Documents(), UnorderedElementsAre("far"));
}

TEST_F(BuildTest, AnOlderFileIsReplacedByForceOnly) {
  const std::string text = folder_.Write("a.txt", "a");
  BuildOptions options{.out = out_, .paths = {text}};
  ASSERT_TRUE(BuildTokenFile(options).ok());
  const auto again = BuildTokenFile(options);
  EXPECT_EQ(ExitCodeOf(again.status()), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(again.status()), HasSubstr("--force"));
  options.force = true;
  EXPECT_TRUE(BuildTokenFile(options).ok());
}

TEST_F(BuildTest, WhatKilledBuildsLeftIsRemoved) {
  const std::string text = folder_.Write("a.txt", "a");
  const std::string dead = folder_.Write("out.h5.123.tmp", "half");
  const std::string kept[] = {folder_.Write("out.h5.tmp", "x"), folder_.Write("out.h5.x1.tmp", "x"),
                              folder_.Write("other.h5.123.tmp", "x"),
                              folder_.Write("out.h5.456.tmp", "of a build that runs")};
  const auto running = File::OpenRead(kept[3], ExitCode::kInternal);
  ASSERT_TRUE(running.ok());
  ASSERT_EQ(flock(running->fd(), LOCK_EX), 0);
  ASSERT_TRUE(Build({text}).ok());
  EXPECT_FALSE(Exists(dead));
  for (const std::string& path : kept) EXPECT_TRUE(Exists(path)) << path;
}

TEST_F(BuildTest, ProgressCountsEachTextTwiceAndItsErrorEndsTheBuild) {
  std::string lines;
  while (lines.size() < size_t{6} << 20)
    lines += "{\"text\": \"" + std::string(1000, 'x') + "\"}\n";
  const std::vector<std::string> paths = {folder_.Write("a.txt", std::string(size_t{5} << 20, 'y')),
                                          folder_.Write("b.jsonl", lines)};
  int64_t last = 0, calls = 0, total = 0;
  BuildOptions options{.out = out_, .paths = paths, .force = true};
  options.progress = [&](int64_t done, int64_t all) {
    EXPECT_GE(done, last);
    EXPECT_LE(done, all);
    last = done, total = all, ++calls;
    return absl::OkStatus();
  };
  ASSERT_TRUE(BuildTokenFile(options).ok());
  EXPECT_GE(calls, 15);
  EXPECT_GT(last, total - (int64_t{2} << 20));
  EXPECT_GE(total, int64_t{21} << 20);
  std::filesystem::remove(out_);
  calls = 0;
  options.progress = [&](int64_t, int64_t) {
    return ++calls < 4 ? absl::OkStatus() : Error(ExitCode::kStopped, "stop");
  };
  const auto stopped = BuildTokenFile(options);
  EXPECT_EQ(ExitCodeOf(stopped.status()), ExitCode::kStopped);
  EXPECT_EQ(calls, 4);
  EXPECT_FALSE(Exists(out_));
}

TEST_F(BuildTest, ALinkGivenByNameIsFollowed) {
  std::filesystem::create_symlink(folder_.Write("real.txt", "text"), folder_ / "link.txt");
  folder_.Write("tree/x.txt", "leaf");
  std::filesystem::create_symlink(folder_ / "tree", folder_ / "branch");
  ASSERT_TRUE(Build({folder_ / "link.txt", folder_ / "branch"}).ok());
  EXPECT_THAT(Documents(), UnorderedElementsAre("text", "leaf"));
}

// Lines with what JSON allows around and inside the text.
const char kLines[] =
    "{\"text\": \"one\"}\r\n"
    "\n"
    "{\"id\": 7, \"meta\": {\"text\": \"inner\", \"list\": [1, [2, {\"text\": 3}]]}, "
    "\"text\": \"two \\u00e9\\n\\\"\"}\n"
    "   \n"
    "{\"text\": \"\"}\n"
    "{\"text\": \"three\", \"x\": null}";

TEST_F(BuildTest, JsonLines) {
  const auto report = Build({folder_.Write("x.jsonl", kLines)});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->files, 1);
  EXPECT_EQ(report->skipped_documents, 1);
  EXPECT_THAT(Documents(), UnorderedElementsAre("one", "two \xC3\xA9\n\"", "three"));
}

TEST_F(BuildTest, PythonsNumbersBesideATextAreNoReasonToRefuseIt) {
  const auto report = Build(
      {folder_.Write("x.jsonl",
                     "{\"score\": NaN, \"text\": \"one NaN\", \"range\": [-Infinity, Infinity]}\n"
                     "{\"text\": \"two\", \"meta\": {\"x\": NaN}}\n")});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(Documents(), UnorderedElementsAre("one NaN", "two"));
}

TEST_F(BuildTest, CompressedJsonLinesGiveTheSameTokenFile) {
  const std::string text(kLines);
  const std::vector<std::string> paths = {
      folder_.Write("x.jsonl", text),
      folder_.Write("x.jsonl.gz", Gzip(text)),
      folder_.Write("x.ndjson", text),
      folder_.Write("x.NDJSON.gz", Gzip(text)),
      folder_.Write("x.jsonl.zst", Zstd(text)),
      folder_.Write("y.jsonl.gz", Gzip(text.substr(0, 20)) + Gzip("") + Gzip(text.substr(20))),
      folder_.Write("y.jsonl.zst", Zstd(text.substr(0, 20)) + Zstd("") + Zstd(text.substr(20)))};
  std::vector<std::string> contents;
  for (const std::string& path : paths) {
    const auto report = Build({path});
    ASSERT_TRUE(report.ok()) << path << ": " << report.status();
    contents.push_back(*ReadFile(out_, 1 << 20, ExitCode::kData));
  }
  for (const std::string& content : contents) EXPECT_EQ(content, contents.front());
}

TEST_F(BuildTest, LargeCompressedInputs) {
  std::string lines;
  std::vector<std::string> texts;
  const RandomStream random(5, RandomPurpose::kSynthetic, 0);
  for (uint64_t i = 0; i < 3000; ++i) {
    std::string text(1 + random.Bits(i)[0] % 2000, ' ');
    for (size_t k = 0; k < text.size(); ++k) {
      text[k] = static_cast<char>('a' + random.Bits(i << 20 | k)[1] % 26);
    }
    lines += nlohmann::json{{"text", text}}.dump() + "\n";
    texts.push_back(std::move(text));
  }
  std::sort(texts.begin(), texts.end());
  const std::vector<std::string> paths = {folder_.Write("x.jsonl", lines),
                                          folder_.Write("x.jsonl.gz", Gzip(lines)),
                                          folder_.Write("x.jsonl.zst", Zstd(lines))};
  for (const std::string& path : paths) {
    const auto report = Build({path});
    ASSERT_TRUE(report.ok()) << report.status();
    std::vector<std::string> documents = Documents();
    std::sort(documents.begin(), documents.end());
    EXPECT_TRUE(documents == texts) << path;
  }
}

// Longer than the pieces in which texts are read, encoded and written.
TEST_F(BuildTest, TextsOfSeveralPieces) {
  std::vector<std::string> texts;
  for (const size_t size : {(size_t{1} << 20) - 1, size_t{1} << 20, (size_t{3} << 20) + 77}) {
    std::string text(size, ' ');
    for (size_t i = 0; i < size; ++i) text[i] = static_cast<char>('0' + i * 7 % 61);
    texts.push_back(text);
  }
  ASSERT_TRUE(Build({folder_.Write("a", texts[0]), folder_.Write("b", texts[1]),
                     folder_.Write("c.jsonl", nlohmann::json{{"text", texts[2]}}.dump())})
                  .ok());
  std::vector<std::string> documents = Documents();
  std::sort(documents.begin(), documents.end(),
            [](const auto& a, const auto& b) { return a.size() < b.size(); });
  EXPECT_TRUE(documents == texts);
}

TEST_F(BuildTest, TheSeedShufflesAndNothingElseMatters) {
  for (int i = 0; i < 30; ++i) {
    folder_.Write("in/" + std::to_string(i), "text " + std::to_string(i));
  }
  ASSERT_TRUE(Build({folder_ / "in"}, 1).ok());
  const std::string first = *ReadFile(out_, 1 << 20, ExitCode::kData);
  const std::vector<std::string> order = Documents();
  sleep(1);  // a stored time would differ
  ASSERT_TRUE(Build({folder_ / "in"}, 1).ok());
  EXPECT_EQ(*ReadFile(out_, 1 << 20, ExitCode::kData), first);
  ASSERT_TRUE(Build({folder_ / "in"}, 2).ok());
  EXPECT_NE(Documents(), order);
  std::vector<std::string> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_NE(order, sorted);
}

TEST_F(BuildTest, EveryMissingPathIsNamedAtOnce) {
  EXPECT_THAT(Fault({folder_ / "no1", folder_.Write("a", "text"), folder_ / "no2"}),
              AllOf(HasSubstr("no1: No such file"), HasSubstr("no2: No such file")));
}

TEST_F(BuildTest, NamedFilesMustBeText) {
  EXPECT_THAT(Fault({folder_.Write("a", "")}), HasSubstr("a is empty"));
  EXPECT_THAT(Fault({folder_.Write("b", std::string("xy\0z", 4))}), HasSubstr("byte 2 is NUL"));
  EXPECT_THAT(Fault({folder_.Write("big", std::string(2 << 20, 'x') + '\0')}),
              HasSubstr("byte 2097152 is NUL"));
  EXPECT_THAT(Fault({folder_.Write("c.txt.gz", Gzip("text"))}), HasSubstr(".jsonl.gz"));
  EXPECT_THAT(Fault({folder_.Write("d.jsonl", " \n{\"text\": \"\"}\n")}),
              HasSubstr("holds no text"));
  const std::string fifo = folder_ / "fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_THAT(Fault({fifo}), HasSubstr("not a regular file"));
}

TEST_F(BuildTest, NothingToRead) {
  EXPECT_THAT(Fault({}), HasSubstr("empty list"));
  folder_.Write("in/binary", std::string(10, '\0'));
  EXPECT_THAT(Fault({folder_ / "in"}), HasSubstr("no text was found in " + (folder_ / "in")));
}

TEST_F(BuildTest, BadLinesAreNamedByTheirNumber) {
  const std::string good = "{\"text\": \"x\"}\n";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{\"text\": \"x\"", "not JSON"},
      {"{\"text\": \"x\"} trailing", "not JSON"},
      {"{'text': 'x'}", "not JSON"},
      {"nonsense", "not JSON"},
      {"{\"text\": \"\xFF\"}", "not JSON"},
      {"{\"text\": \"\\ud800\"}", "not JSON"},
      {"{\"text\": \"x\", \"n\": 1e999}", "not JSON"},
      {std::string("{\"text\": \"x\0\"}", 13), "not JSON"},
      {std::string(1 << 20, '['), "an object"},
      {std::string(1 << 20, '[') + std::string(1 << 20, ']'), "an object"},
      {"[\"text\"]", "an object"},
      {"\"text\"", "an object"},
      {"17", "an object"},
      {"[{\"text\": \"x\"}]", "an object"},
      {"{}", "\"text\" is missing"},
      {"{\"Text\": \"x\"}", "\"text\" is missing"},
      {"{\"a\": {\"text\": \"x\"}}", "\"text\" is missing"},
      {"{\"text\": 5}", "not a string"},
      {"{\"text\": null}", "not a string"},
      {"{\"text\": NaN}", "not a string"},
      {"{\"text\": \"x\", \"n\": NaNa}", "not JSON"},
      {"{\"text\": [\"x\"]}", "not a string"},
      {"{\"text\": {\"text\": \"x\"}}", "not a string"},
      {"{\"text\": \"x\", \"text\": 5}", "not a string"},
  };
  for (const auto& [line, reason] : cases) {
    const std::string message = Fault({folder_.Write("x.jsonl", good + "\n" + line + "\n" + good)});
    EXPECT_THAT(message.substr(0, 2000), AllOf(HasSubstr("x.jsonl:3: "), HasSubstr(reason)))
        << line.substr(0, 100);
    EXPECT_LT(message.size(), 1000u) << line.substr(0, 100);
  }
  EXPECT_THAT(Fault({folder_.Write("x.jsonl.gz", Gzip(good + "oops"))}),
              HasSubstr("x.jsonl.gz:2: not JSON"));
  folder_.Write("in/bad.jsonl", "oops");
  EXPECT_THAT(Fault({folder_ / "in"}), HasSubstr("in/bad.jsonl:1: not JSON"));
}

TEST_F(BuildTest, DamagedCompressedFilesAreNamed) {
  std::string lines;
  for (int i = 0; i < 200; ++i) lines += "{\"text\": \"line " + std::to_string(i * i) + "\"}\n";
  for (const bool gzip : {true, false}) {
    const std::string name = gzip ? "x.jsonl.gz" : "x.jsonl.zst";
    const std::string whole = gzip ? Gzip(lines) : Zstd(lines);
    for (size_t size = 0; size < whole.size(); size += 1 + whole.size() / 97) {
      EXPECT_THAT(Fault({folder_.Write(name, whole.substr(0, size))}), HasSubstr(name))
          << "cut to " << size;
    }
    EXPECT_THAT(Fault({folder_.Write(name, whole.substr(0, whole.size() - 1))}),
                HasSubstr("at byte " + std::to_string(whole.size() - 1)));
    EXPECT_THAT(Fault({folder_.Write(name, lines)}), HasSubstr("not a sound"));
    EXPECT_THAT(Fault({folder_.Write(name, whole + "garbage")}), HasSubstr("at byte"));
    // Each flip is an error, or one of the bits of a header that say nothing of the content (gzip:
    // time, extra flags, operating system).
    const RandomStream random(6, RandomPurpose::kSynthetic, gzip);
    ASSERT_TRUE(Build({folder_.Write(name, whole)}).ok());
    const std::vector<std::string> documents = Documents();
    for (uint64_t i = 0; i < 100; ++i) {
      std::string flipped = whole;
      flipped[random.Bits(i)[0] % whole.size()] ^= static_cast<char>(1 << random.Bits(i)[1] % 8);
      std::filesystem::remove(out_);
      const auto report = Build({folder_.Write(name, flipped)});
      if (report.ok()) {
        EXPECT_EQ(Documents(), documents);
      } else {
        EXPECT_EQ(ExitCodeOf(report.status()), ExitCode::kData);
      }
    }
    std::filesystem::remove(out_);
  }
}

TEST_F(BuildTest, BadOutputs) {
  const std::string text = folder_.Write("a", "text");
  for (const std::string& bad :
       {std::string(), folder_.path(), folder_ / "none/x.h5", folder_ / "a/x.h5"}) {
    const auto report = BuildTokenFile({.out = bad, .paths = {text}});
    EXPECT_EQ(ExitCodeOf(report.status()), ExitCode::kConfig) << bad << ": " << report.status();
  }
  const auto report = BuildTokenFile({.tokenizer = "none", .out = out_, .paths = {text}});
  EXPECT_EQ(ExitCodeOf(report.status()), ExitCode::kConfig);
}

TEST_F(BuildTest, AFailedBuildLeavesTheOldFile) {
  ASSERT_TRUE(Build({folder_.Write("a", "old text")}).ok());
  ASSERT_FALSE(Build({folder_ / "missing"}).ok());
  EXPECT_THAT(Documents(), UnorderedElementsAre("old text"));
}

// Limits on the size of files stand in for a full disk: writes fail with EFBIG.
TEST_F(BuildTest, AFullDiskIsExitCode31AndLeavesNothing) {
  const std::string text(600000, 'x');
  folder_.Write("in/a", text);
  folder_.Write("in/b.jsonl.gz", Gzip(nlohmann::json{{"text", text}}.dump()));
  for (int64_t limit = 0; limit < 1200000; limit += 60000) {
    const pid_t child = fork();
    if (child == 0) {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit bound = {static_cast<rlim_t>(limit), static_cast<rlim_t>(limit)};
      if (setrlimit(RLIMIT_FSIZE, &bound) != 0) _exit(99);
      std::exit(static_cast<int>(ExitCodeOf(Build({folder_ / "in"}).status())));
    }
    int status = -1;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFEXITED(status)) << "signal at limit " << limit;
    EXPECT_EQ(WEXITSTATUS(status), static_cast<int>(ExitCode::kCannotSave)) << limit;
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
      EXPECT_EQ(entry.path().filename(), "in");
    }
  }
  EXPECT_TRUE(Build({folder_ / "in"}).ok());
}

TEST_F(BuildTest, InspectTellsWhatIsInside) {
  ASSERT_TRUE(Build({folder_.Write("a", "tab\there \xC3\xA9"), folder_.Write("b", "12")}).ok());
  for (const bool verify : {false, true}) {
    const auto summary = InspectTokenFile(out_, verify);
    ASSERT_TRUE(summary.ok()) << summary.status();
    EXPECT_EQ(summary->tokens, 13);
    EXPECT_EQ(summary->documents, 2);
    EXPECT_EQ(summary->shortest_document, 2);
    EXPECT_EQ(summary->longest_document, 11);
    EXPECT_EQ(summary->mean_document, 6.5);
    EXPECT_EQ(summary->preview, Documents().front());
    EXPECT_THAT(summary->ToText(), HasSubstr(verify ? "\n  verified" : "\n  not verified"));
    const auto json = nlohmann::json::parse(summary->ToJson());
    EXPECT_EQ(json["tokens"], 13);
    EXPECT_EQ(json["verified"], verify);
    EXPECT_EQ(json["content_hash"], summary->content_hash);
    EXPECT_FALSE(json.contains("damage"));
  }
  EXPECT_EQ(ExitCodeOf(InspectTokenFile(folder_ / "none", true).status()), ExitCode::kData);
}

TEST_F(BuildTest, LineReaderCountsLinesAndBytes) {
  auto reader = LineReader::Open(folder_.Write("x", "ab\n\nc\r\nlast"));
  ASSERT_TRUE(reader.ok());
  std::string line;
  const std::vector<std::pair<std::string, int64_t>> expected = {
      {"ab", 0}, {"", 3}, {"c\r", 4}, {"last", 7}};
  for (const auto& [text, begin] : expected) {
    ASSERT_TRUE(*reader->Next(&line));
    EXPECT_EQ(line, text);
    EXPECT_EQ(reader->line_begin(), begin);
  }
  EXPECT_EQ(reader->line_number(), 4);
  EXPECT_FALSE(*reader->Next(&line));
  EXPECT_FALSE(*reader->Next(&line));
}

}  // namespace
}  // namespace krait
