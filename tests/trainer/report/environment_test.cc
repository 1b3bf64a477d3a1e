#include "trainer/report/environment.h"

#include <gtest/gtest.h>

#include <limits>

#include "support/temp_folder.h"

namespace krait {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

TEST(ControlGroups, TheLowestLimitAroundTheProcessCounts) {
  const TempFolder root;
  const std::string groups = root.Write("cgroup", "0::/user.slice/job.scope/step\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), kNone);
  root.Write("user.slice/job.scope/step/memory.max", "max\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), kNone);
  root.Write("user.slice/job.scope/memory.max", "4000000\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), 4000000);
  root.Write("user.slice/memory.max", "9000000\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), 4000000);
  root.Write("user.slice/job.scope/step/memory.max", "3000000\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), 3000000);
  root.Write("memory.max", "2000000\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), 2000000);
}

TEST(ControlGroups, VersionOneAndContainers) {
  const TempFolder root;
  const std::string groups = root.Write(
      "cgroup", "12:cpu,cpuacct:/a\n4:memory:/docker/0123\n1:name=systemd:/a\n0::/\nnonsense\n");
  // A container sees its own group as the root, under whatever path the host knows it.
  root.Write("memory/memory.limit_in_bytes", "5000000\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), 5000000);
  root.Write("memory/docker/memory.limit_in_bytes", "4000000\n");
  root.Write("memory/docker/0123/memory.limit_in_bytes", "9223372036854771712\n");  // no limit
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), 4000000);
  root.Write("memory.max", "1000000\n");
  EXPECT_EQ(ControlGroupMemory(groups, root.path()), 1000000);
  EXPECT_EQ(ControlGroupMemory(root / "none", root.path()), kNone);
}

TEST(ControlGroups, TheMachineHasMemory) {
  EXPECT_GT(MachineMemory(), int64_t{1} << 28);
  EXPECT_LT(MachineMemory(), int64_t{1} << 50);
}

}  // namespace
}  // namespace krait
