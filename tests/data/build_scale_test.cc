// data build with tokenizers, threads, bad records, and after a kill.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "data/token_file.h"
#include "kernels/base/file.h"
#include "kernels/base/stop_signals.h"
#include "paths.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kTokenizers = std::string(KRAIT_TEST_GOLDEN) + "/tokenizers/";

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class BuildScaleTest : public ::testing::Test {
 protected:
  BuildOptions Options(const std::string& out, const std::vector<std::string>& paths) const {
    return {.out = folder_ / out, .paths = paths, .seed = 7};
  }
  std::unique_ptr<TokenFile> Open(const std::string& name) const {
    auto file = TokenFile::Open(folder_ / name);
    EXPECT_TRUE(file.ok()) << file.status();
    return file.ok() ? *std::move(file) : nullptr;
  }
  TempFolder folder_;
};

TEST_F(BuildScaleTest, DocumentsAreFramedAndTheFileCarriesItsTokenizer) {
  const std::string text = "Some text, and more of it.";
  BuildOptions options = Options("x.h5", {folder_.Write("a.txt", text)});
  options.tokenizer = kTokenizers + "llama3.json";
  const auto report = BuildTokenFile(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->text_bytes, static_cast<int64_t>(text.size()));
  const auto file = Open("x.h5");
  ASSERT_TRUE(file->Verify().ok());
  const auto tokenizer = MakeTokenizer(options.tokenizer);
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_EQ(file->tokenizer(), (*tokenizer)->name());
  EXPECT_EQ(file->vocab_size(), 700);
  EXPECT_EQ(file->end_token(), 1);
  std::vector<int32_t> wanted = {0};
  ASSERT_TRUE((*tokenizer)->Encode(text, &wanted).ok());
  wanted.push_back(1);
  std::vector<int32_t> ids(static_cast<size_t>(file->tokens()));
  ASSERT_TRUE(file->Read(0, file->tokens(), ids.data()).ok());
  EXPECT_EQ(ids, wanted);
  EXPECT_EQ(file->tokens_per_byte(),
            static_cast<double>(wanted.size()) / static_cast<double>(text.size()));
  // From the file alone the tokenizer can be made again.
  ASSERT_TRUE(KeepTokenizer(*file, folder_ / "kept").ok());
  const auto kept = MakeTokenizer(folder_ / "kept");
  ASSERT_TRUE(kept.ok()) << kept.status();
  EXPECT_EQ((*kept)->name(), file->tokenizer());
}

TEST_F(BuildScaleTest, ThreadsChangeNothing) {
  std::string lines;
  for (int i = 0; i < 20000; ++i) {
    lines += "{\"text\": \"line " + std::to_string(i * i) + " of \\u00e9 text\\n\"}\n";
  }
  const std::vector<std::string> paths = {folder_.Write("a.jsonl", lines),
                                          folder_.Write("b.txt", std::string(3 << 20, 'y'))};
  for (const std::string& tokenizer : {std::string("bytes"), kTokenizers + "qwen2.json"}) {
    std::vector<std::string> files;
    for (const int threads : {1, 5}) {
      BuildOptions options = Options(std::to_string(threads) + ".h5", paths);
      options.tokenizer = tokenizer;
      options.threads = threads;
      options.force = true;
      ASSERT_TRUE(BuildTokenFile(options).ok());
      files.push_back(ReadAll(options.out));
    }
    EXPECT_TRUE(files[0] == files[1]) << tokenizer;
  }
}

TEST_F(BuildScaleTest, BadRecordsArePassedOverWithinALimit) {
  const std::string path = folder_.Write(
      "a.jsonl",
      "{\"text\": \"one\"}\noops\n{\"text\": \"two\"}\n{\"txt\": 1}\n{\"text\": \"3\"}\n");
  BuildOptions options = Options("x.h5", {path});
  EXPECT_THAT(MessageOf(BuildTokenFile(options).status()), HasSubstr("a.jsonl:2: not JSON"));
  options.max_bad = 1;
  const auto refused = BuildTokenFile(options);
  EXPECT_EQ(ExitCodeOf(refused.status()), ExitCode::kData);
  EXPECT_THAT(MessageOf(refused.status()),
              AllOf(HasSubstr("2 bad records are more than --max-bad 1"), HasSubstr("a.jsonl:2: "),
                    HasSubstr("a.jsonl:4: ")));
  options.max_bad = 2;
  const auto report = BuildTokenFile(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->documents, 3);
  EXPECT_EQ(report->bad_records, 2);
  EXPECT_THAT(report->bad, ElementsAre(HasSubstr("a.jsonl:2: not JSON"),
                                       HasSubstr("a.jsonl:4: the field \"text\" is missing")));
  // What a tokenizer cannot encode is bad too.
  options = Options("y.h5", {folder_.Write("c.txt", "no UTF-8: \xFF")});
  options.tokenizer = kTokenizers + "sp_bpe.model";
  EXPECT_THAT(MessageOf(BuildTokenFile(options).status()), HasSubstr("c.txt: byte 10 of the text"));
}

// Enough for some marks.
std::string ManyLines(const TempFolder& folder) {
  std::string lines;
  for (int i = 0; lines.size() < (size_t{220} << 20); ++i) {
    lines +=
        "{\"text\": \"" + std::to_string(i) + std::string(2000, static_cast<char>('a' + i % 26));
    lines += "\"}\n";
  }
  return folder.Write("many.jsonl", lines);
}

TEST_F(BuildScaleTest, AKilledBuildGoesOn) {
  const std::string path = ManyLines(folder_);
  ASSERT_TRUE(BuildTokenFile(Options("whole.h5", {path})).ok());
  const BuildOptions options = Options("x.h5", {path});
  const std::string journal = options.out + ".parts/journal";
  for (ptrdiff_t marks = 1; marks <= 2; ++marks) {
    const pid_t child = fork();
    if (child == 0) _exit(BuildTokenFile(options).ok() ? 0 : 1);
    int status = 0;
    while (waitpid(child, &status, WNOHANG) == 0) {
      const std::string text = ReadAll(journal);
      if (std::count(text.begin(), text.end(), '\n') > marks) kill(child, SIGKILL);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_TRUE(WIFSIGNALED(status)) << "it was done before it was killed";
    ASSERT_FALSE(Exists(options.out));
  }
  // What was written after the last mark, or half a mark, does not count.
  std::ofstream(journal, std::ios::app) << "0123abcd {\"input\": 0";
  std::ofstream(options.out + ".parts/tokens", std::ios::app) << "beyond";
  const auto report = BuildTokenFile(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_GT(report->resumed_documents, 0);
  EXPECT_TRUE(ReadAll(options.out) == ReadAll(folder_ / "whole.h5"));
  EXPECT_FALSE(Exists(options.out + ".parts"));
}

TEST_F(BuildScaleTest, OtherInputsBeginAnew) {
  const std::string path = ManyLines(folder_);
  BuildOptions options = Options("x.h5", {path});
  options.progress = [](int64_t done, int64_t total) {
    return done < total * 2 / 5 ? absl::OkStatus() : Error(ExitCode::kStopped, "stop");
  };
  const auto stopped = BuildTokenFile(options);
  EXPECT_THAT(MessageOf(stopped.status()),
              AllOf(HasSubstr("stop; "), HasSubstr("x.h5.parts keeps what was done")));
  ASSERT_TRUE(Exists(options.out + ".parts"));
  std::ofstream(path, std::ios::app) << "{\"text\": \"one more\"}\n";
  options.progress = nullptr;
  const auto report = BuildTokenFile(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->resumed_documents, 0);
}

TEST_F(BuildScaleTest, OneBuildAtATime) {
  const std::string path = folder_.Write("a.txt", "text");
  folder_.Write("x.h5.parts/lock", "");
  const auto held = File::OpenWrite(folder_ / "x.h5.parts/lock", ExitCode::kInternal);
  ASSERT_TRUE(held.ok());
  ASSERT_EQ(flock(held->fd(), LOCK_EX), 0);
  const auto refused = BuildTokenFile(Options("x.h5", {path}));
  EXPECT_EQ(ExitCodeOf(refused.status()), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(refused.status()), HasSubstr("another process builds this token file"));
  EXPECT_TRUE(Exists(folder_ / "x.h5.parts"));
}

}  // namespace
}  // namespace krait
