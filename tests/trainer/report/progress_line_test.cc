#include "trainer/report/progress_line.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

namespace krait {
namespace {

using ::testing::HasSubstr;

TEST(ProgressLine, TellsShareAndRestAfterASecond) {
  std::vector<std::string> lines;
  ProgressLine line("building", [&](const std::string& text) { lines.push_back(text); });
  line.Update(1, 100);
  EXPECT_TRUE(lines.empty());
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  line.Update(50, 100);
  line.Update(51, 100);  // too soon after the last
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_THAT(lines[0], HasSubstr("building 50% | ETA "));
}

TEST(ProgressLine, LinesComeEverySoManySecondsWithoutATerminal) {
  testing::internal::CaptureStderr();
  const ProgressLine::Draw rare = ProgressLine::OnStandardError();
  for (int i = 0; i < 100; ++i) rare("x");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  testing::internal::CaptureStderr();
  ProgressLine::OnStandardError(/*every=*/0)("x 50%");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "krait: x 50%\n");
}

}  // namespace
}  // namespace krait
