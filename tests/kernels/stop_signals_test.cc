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

}  // namespace
}  // namespace krait
