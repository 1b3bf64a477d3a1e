// For tests under mpirun: see ranks_main.cc.
#ifndef KRAIT_TESTS_SUPPORT_RANKS_H_
#define KRAIT_TESTS_SUPPORT_RANKS_H_

#include <gtest/gtest.h>

#include <cstdio>
#include <functional>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/world.h"

namespace krait::testing {

World* TestWorld();

// The ranks of another world, as if each `per_machine` of them in a row had a machine of their own.
class SplitWorld : public World {
 public:
  SplitWorld(World* world, int per_machine)
      : World(world->rank(), world->size(), world->rank() % per_machine, per_machine,
              world->rank() / per_machine * per_machine),
        world_(world) {}

 private:
  void Transfer(const std::vector<Message>& sends, const std::vector<Message>& receives,
                const std::function<void(int)>& /*waits_for*/) override {
    world_->Exchange(sends, receives, "test");
  }
  World* world_;
};

// Messages between all ranks: a sends b a + b rows, none where that is even; itself as many.
struct UnevenRows {
  UnevenRows() {
    const World& world = *TestWorld();
    const auto rows = [](int a, int b) { return (a + b) % 2 == 0 && a != b ? 0 : int64_t{a + b}; };
    for (int r = 0; r < world.size(); ++r) {
      sends.push_back({r, sent, rows(world.rank(), r)});
      sent += rows(world.rank(), r);
      receives.push_back({r, received, rows(r, world.rank())});
      received += rows(r, world.rank());
    }
  }
  std::vector<RowMessage> sends, receives;
  int64_t sent = 0, received = 0;
};

// Prints nothing but failures, with the rank.
class FailurePrinter : public ::testing::EmptyTestEventListener {
 public:
  explicit FailurePrinter(int rank) : rank_(rank) {}
  void OnTestPartResult(const ::testing::TestPartResult& part) override {
    if (!part.failed()) return;
    std::printf("rank %d: %s:%d: %s\n", rank_, part.file_name(), part.line_number(),
                part.summary());
  }

 private:
  int rank_;
};

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_RANKS_H_
