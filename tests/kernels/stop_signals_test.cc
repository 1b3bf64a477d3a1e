#include "kernels/base/stop_signals.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>

namespace krait {
namespace {

TEST(StopSignalsTest, AProcessStopsWhereItCan) {
  for (const int signal : {SIGUSR1, SIGTERM, SIGHUP, SIGINT}) {
    const StopSignals signals("stopping");
    EXPECT_FALSE(StopRequested());
    std::raise(signal);
    EXPECT_TRUE(StopRequested()) << signal;
  }
  EXPECT_FALSE(StopRequested());
}

TEST(StopSignalsTest, ARankOnlyBySigusr1) {
  const StopSignals signals("stopping", /*of_a_rank=*/true);
  std::raise(SIGUSR1);
  EXPECT_TRUE(StopRequested());
  for (const int signal : {SIGTERM, SIGINT}) {
    EXPECT_EXIT(std::raise(signal), ::testing::KilledBySignal(signal), "");
  }
}

// A request that comes before the object is made is not lost, nor one that comes after it is gone.
TEST(StopSignalsTest, ARequestIsHeldWhileAProgramStarts) {
  EXPECT_EXIT(std::raise(SIGUSR1), ::testing::KilledBySignal(SIGUSR1), "");
  HoldStopSignal();
  std::raise(SIGUSR1);
  EXPECT_FALSE(StopRequested());
  {
    const StopSignals signals("stopping", /*of_a_rank=*/true);
    EXPECT_TRUE(StopRequested());
  }
  std::raise(SIGUSR1);
  {
    const StopSignals signals("stopping");
    EXPECT_TRUE(StopRequested());
  }
  LetStopSignalThrough();
  const StopSignals signals("stopping");
  EXPECT_FALSE(StopRequested());
}

}  // namespace
}  // namespace krait
