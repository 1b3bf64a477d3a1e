// For tests under mpirun: see ranks_main.cc.
#ifndef KRAIT_TESTS_SUPPORT_RANKS_H_
#define KRAIT_TESTS_SUPPORT_RANKS_H_

#include <gtest/gtest.h>

#include <cstdio>

#include "parallel/world.h"

namespace krait::testing {

World* TestWorld();

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
