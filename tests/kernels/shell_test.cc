#include "kernels/base/shell.h"

#include <gtest/gtest.h>
#include <stdlib.h>

namespace krait {
namespace {

TEST(UserPath, LosesItsLastSlashesAndItsTilde) {
  EXPECT_EQ(UserPath("a/b//"), "a/b");
  EXPECT_EQ(UserPath("/"), "/");
  EXPECT_EQ(UserPath("//"), "/");
  EXPECT_EQ(UserPath(""), "");
  EXPECT_EQ(UserPath("a~/b"), "a~/b");
  EXPECT_EQ(UserPath("~other/x"), "~other/x");
  ASSERT_EQ(setenv("HOME", "/home of/me", 1), 0);
  EXPECT_EQ(UserPath("~/x/"), "/home of/me/x");
  EXPECT_EQ(UserPath("~"), "/home of/me");
  ASSERT_EQ(unsetenv("HOME"), 0);
  EXPECT_EQ(UserPath("~/x"), "~/x");
}

TEST(ShellQuoted, OnlyWhatAShellWouldTakeOtherwise) {
  EXPECT_EQ(ShellQuoted("runs/a-b_1.yaml"), "runs/a-b_1.yaml");
  EXPECT_EQ(ShellQuoted("optimizer.lr=1e-3"), "optimizer.lr=1e-3");
  EXPECT_EQ(ShellQuoted("a run"), "'a run'");
  EXPECT_EQ(ShellQuoted("it's"), "'it'\\''s'");
  EXPECT_EQ(ShellQuoted(""), "''");
  EXPECT_EQ(ShellQuoted("$x;~"), "'$x;~'");
}

}  // namespace
}  // namespace krait
