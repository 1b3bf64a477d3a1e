#include "kernels/base/number.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

namespace krait {
namespace {

TEST(ParseInteger, AcceptsExactWholeNumbers) {
  const std::pair<const char*, int64_t> cases[] = {
      {"0", 0},
      {"-0", 0},
      {"12", 12},
      {"-12", -12},
      {"1_000_000", 1000000},
      {"4Mi", 4 << 20},
      {"16Ki", 16384},
      {"2Gi", int64_t{2} << 30},
      {"0.5Ki", 512},
      {"1.5k", 1500},
      {"1.5M", 1500000},
      {"100B", 100'000'000'000},
      {"15T", 15'000'000'000'000},
      {"1e9", 1'000'000'000},
      {"1E+3", 1000},
      {"2.5e1", 25},
      {"1200e-2", 12},
      {"12.0", 12},
      {"9223372036854775807", std::numeric_limits<int64_t>::max()},
      {"-9223372036854775807", -std::numeric_limits<int64_t>::max()},
  };
  for (const auto& [text, value] : cases) {
    std::string why;
    const auto parsed = ParseInteger(text, &why);
    ASSERT_TRUE(parsed.has_value()) << text << " " << why;
    EXPECT_EQ(*parsed, value) << text;
  }
}

TEST(ParseInteger, RefusesEverythingElse) {
  for (const char* text : {"",
                           " 1",
                           "1 ",
                           "+1",
                           "-",
                           ".",
                           "1.",
                           "--1",
                           "010",
                           "00",
                           "0x10",
                           "1__0",
                           "_1",
                           "1_",
                           "1_k",
                           "3.7",
                           "1e-1",
                           "0.3Ki",
                           "1KI",
                           "1K",
                           "1G",
                           "1kB",
                           "1e",
                           "1e+",
                           "1e99",
                           "9223372036854775808",
                           "99999999999T",
                           "12abc",
                           "nan",
                           ".nan",
                           "inf",
                           "-.inf",
                           "1e99999999999",
                           "1,000",
                           "ten"}) {
    std::string why;
    EXPECT_FALSE(ParseInteger(text, &why).has_value()) << text;
    EXPECT_NE(why, "") << text;
  }
}

TEST(ParseInteger, SaysWhy) {
  std::string why;
  ParseInteger("010", &why);
  EXPECT_NE(why.find("leading zero"), std::string::npos) << why;
  ParseInteger("3.7", &why);
  EXPECT_NE(why.find("whole number"), std::string::npos) << why;
  ParseInteger(".nan", &why);
  EXPECT_NE(why.find("finite"), std::string::npos) << why;
  ParseInteger("1e40", &why);
  EXPECT_NE(why.find("out of range"), std::string::npos) << why;
}

TEST(ParseNumber, ReadsTheNearestDouble) {
  EXPECT_EQ(ParseNumber("3e-4"), 3e-4);
  EXPECT_EQ(ParseNumber("0.1"), 0.1);
  EXPECT_EQ(ParseNumber(".5"), 0.5);
  EXPECT_EQ(ParseNumber("-2.5"), -2.5);
  EXPECT_EQ(ParseNumber("1.5Ki"), 1536.0);
  EXPECT_EQ(ParseNumber("1.1M"), 1.1e6);
  EXPECT_EQ(ParseNumber("1_0.2_5"), 10.25);
  EXPECT_EQ(ParseNumber("0"), 0.0);
  for (const char* text : {".inf", "nan", "1e400", "1e-400", "01.5", "0x1p3", "1e309", "1.", "a"}) {
    EXPECT_FALSE(ParseNumber(text).has_value()) << text;
  }
}

TEST(ParseBytes, NamesBytes) {
  EXPECT_EQ(ParseBytes("512"), 512);
  EXPECT_EQ(ParseBytes("80GiB"), int64_t{80} << 30);
  EXPECT_EQ(ParseBytes("80Gi"), int64_t{80} << 30);
  EXPECT_EQ(ParseBytes("1.5Ti"), int64_t{1536} << 30);
  EXPECT_EQ(ParseBytes("512MB"), 512'000'000);
  EXPECT_EQ(ParseBytes("64G"), 64'000'000'000);
  EXPECT_EQ(ParseBytes("64kB"), 64'000);
  EXPECT_EQ(ParseBytes("64KiB"), 65536);
  EXPECT_FALSE(ParseBytes("-1Gi").has_value());
  EXPECT_FALSE(ParseBytes("lots").has_value());
  EXPECT_FALSE(ParseBytes("9e18Ti").has_value());
}

TEST(PrintNumber, RoundTrips) {
  EXPECT_EQ(PrintNumber(0.1), "0.1");
  EXPECT_EQ(PrintNumber(1), "1");
  EXPECT_EQ(PrintNumber(3e-4), "3e-4");
  EXPECT_EQ(PrintNumber(1e-10), "1e-10");
  EXPECT_EQ(PrintNumber(-1e22), "-1e22");
  for (double x : {3e-4, 0.1, 1e-8, 1.0 / 3, 1e22, 5e-324, 1.7976931348623157e308, -0.75, 0.95}) {
    EXPECT_EQ(ParseNumber(PrintNumber(x)), x) << PrintNumber(x);
  }
}

TEST(Print, ForPeople) {
  EXPECT_EQ(PrintGrouped(51570323328), "51,570,323,328");
  EXPECT_EQ(PrintGrouped(999), "999");
  EXPECT_EQ(PrintGrouped(-1000), "-1,000");
  EXPECT_EQ(PrintGrouped(0), "0");
  EXPECT_EQ(PrintShort(1240000), "1.24M");
  EXPECT_EQ(PrintShort(999), "999");
  EXPECT_EQ(PrintShort(999.7), "1.00k");
  EXPECT_EQ(PrintShort(8.247e9), "8.25B");
  EXPECT_EQ(PrintShort(-1500), "-1.50k");
  EXPECT_EQ(PrintBytes(4294967296), "4.00 GiB");
  EXPECT_EQ(PrintBytes(512), "512 B");
  EXPECT_EQ(PrintBytes(1048575), "1.00 MiB");
  EXPECT_EQ(PrintBytes(65112965120), "60.6 GiB");
}

}  // namespace
}  // namespace krait
