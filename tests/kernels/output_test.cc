// What a command's output may replace.
#include "kernels/base/output.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

TEST(CheckOutput, TakesNewAndEmptyFilesAndItsOwnKindByForce) {
  const TempFolder folder;
  EXPECT_TRUE(CheckOutput(folder / "new", FileKind::kJson, {}, false).ok());
  EXPECT_TRUE(CheckOutput(folder.Write("empty", ""), FileKind::kHdf5, {}, false).ok());
  const auto by_force_only = [&](const std::string& content, FileKind kind) {
    const std::string path = folder.Write("old", content);
    const absl::Status refused = CheckOutput(path, kind, {}, /*force=*/false);
    EXPECT_EQ(ExitCodeOf(refused), ExitCode::kConfig);
    EXPECT_THAT(MessageOf(refused), HasSubstr("--force"));
    EXPECT_TRUE(CheckOutput(path, kind, {}, /*force=*/true).ok());
  };
  by_force_only(" \n{\"x\": 1}", FileKind::kJson);
  by_force_only("\x89HDF\r\n\x1a\nrest", FileKind::kHdf5);
  by_force_only(std::string("\x02\0\0\0\0\0\0\0{}data", 14), FileKind::kSafetensors);
}

TEST(CheckOutput, RefusesAllElseWithTheReason) {
  const TempFolder folder;
  const auto refusal = [&](const std::string& path, FileKind kind,
                           const std::vector<std::string>& inputs = {}) {
    const absl::Status status = CheckOutput(path, kind, inputs, /*force=*/true);
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig) << path;
    EXPECT_THAT(MessageOf(status), HasSubstr(path));
    return MessageOf(status);
  };
  const std::string notes = folder.Write("notes.md", "# Notes"), json = folder.Write("in", "{}");
  for (const FileKind kind : {FileKind::kJson, FileKind::kHdf5, FileKind::kSafetensors}) {
    EXPECT_THAT(refusal(notes, kind), HasSubstr("it exists and is no "));
    EXPECT_THAT(refusal(folder.path(), kind), HasSubstr("a folder"));
    EXPECT_THAT(refusal("/dev/full", kind), HasSubstr("a device"));
  }
  EXPECT_THAT(refusal(folder.Write("short", "{"), FileKind::kSafetensors), HasSubstr("is no"));
  // Under another name it is still the input.
  std::filesystem::create_symlink(json, folder / "link");
  EXPECT_THAT(refusal(folder / "link", FileKind::kJson, {notes, json}), HasSubstr("the input"));
}

}  // namespace
}  // namespace krait
