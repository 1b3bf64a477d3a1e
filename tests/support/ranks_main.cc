// The main of tests that run under mpirun (files *_ranks_test.cc): all ranks run the same tests,
// the first one speaks, and the program fails on all ranks when it fails on one.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "support/ranks.h"

namespace krait::testing {
namespace {

std::unique_ptr<World> world;

}  // namespace

World* TestWorld() { return world.get(); }

}  // namespace krait::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  krait::testing::world = krait::StartWorld(&argc, &argv).value();
  krait::World* const world = krait::testing::world.get();
  if (!world->first()) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new krait::testing::FailurePrinter(world->rank()));
  }
  const int result = RUN_ALL_TESTS();
  int worst = 0;
  for (const int64_t other : world->AllGather(result)) worst = std::max<int>(worst, other != 0);
  krait::testing::world.reset();
  return worst;
}
