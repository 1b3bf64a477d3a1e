// How runs share a machine.
#include "trainer/ablate/sweep_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

std::vector<int> Cores(int count) {
  std::vector<int> cores(static_cast<size_t>(count));
  std::iota(cores.begin(), cores.end(), 0);
  return cores;
}

TEST(SweepRun, EachJobHasAGpuOfItsOwn) {
  const auto slots = ShareOut(4, 1, {"0", "1", "2", "3"}, Cores(64));
  ASSERT_THAT(slots, SizeIs(4));
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_THAT(slots[i].gpus, ElementsAre(std::to_string(i)));
    ASSERT_THAT(slots[i].cores, SizeIs(16));
    EXPECT_EQ(slots[i].cores.front(), static_cast<int>(16 * i));
  }
  // One per rank; what is left over is nobody's.
  const auto pairs = ShareOut(2, 2, {"GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e"}, Cores(4));
  ASSERT_THAT(pairs, SizeIs(2));
  EXPECT_THAT(pairs[0].gpus, ElementsAre("GPU-a", "GPU-b"));
  EXPECT_THAT(pairs[1].gpus, ElementsAre("GPU-c", "GPU-d"));
  EXPECT_THAT(pairs[1].cores, ElementsAre(2, 3));
}

TEST(SweepRun, CoresAreSharedOut) {
  const auto slots = ShareOut(3, 1, {}, {0, 1, 4, 5, 6, 7, 9});
  ASSERT_THAT(slots, SizeIs(3));
  EXPECT_THAT(slots[0].gpus, IsEmpty());
  EXPECT_THAT(slots[0].cores, ElementsAre(0, 1));
  EXPECT_THAT(slots[1].cores, ElementsAre(4, 5));
  EXPECT_THAT(slots[2].cores, ElementsAre(6, 7, 9));
  // More jobs than cores: each has one.
  for (const RunSlot& slot : ShareOut(5, 1, {}, {2, 3})) EXPECT_THAT(slot.cores, SizeIs(1));
}

}  // namespace
}  // namespace krait
