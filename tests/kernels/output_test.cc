// What a command's output may replace.
#include "kernels/base/output.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

TEST(CheckOutput, TakesNewEmptyAndItsOwnKind) {
  const TempFolder folder;
  EXPECT_TRUE(CheckOutput(folder / "new", FileKind::kJson, {}).ok());
  EXPECT_TRUE(CheckOutput(folder.Write("empty", ""), FileKind::kHdf5, {}).ok());
  EXPECT_TRUE(CheckOutput(folder.Write("a", " \n{\"x\": 1}"), FileKind::kJson, {}).ok());
  EXPECT_TRUE(CheckOutput(folder.Write("b", "\x89HDF\r\n\x1a\nrest"), FileKind::kHdf5, {}).ok());
  const std::string safetensors = std::string("\x02\0\0\0\0\0\0\0{}data", 14);
  EXPECT_TRUE(CheckOutput(folder.Write("c", safetensors), FileKind::kSafetensors, {}).ok());
}

TEST(CheckOutput, RefusesAllElseWithTheReason) {
  const TempFolder folder;
  const auto refusal = [&](const std::string& path, FileKind kind,
                           const std::vector<std::string>& inputs = {}) {
    const absl::Status status = CheckOutput(path, kind, inputs);
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
