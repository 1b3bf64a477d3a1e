#include "trainer/tools/terminal_text.h"

#include <gtest/gtest.h>

namespace krait {
namespace {

std::string Shown(const std::string& bytes) {
  TerminalText whole, single;
  std::string at_once = whole.Take(bytes);
  at_once += whole.Rest();
  std::string by_byte;
  for (const char c : bytes) by_byte += single.Take(std::string(1, c));
  by_byte += single.Rest();
  EXPECT_EQ(by_byte, at_once);
  return at_once;
}

TEST(TerminalText, TextStaysAndControlBytesShow) {
  EXPECT_EQ(Shown("tab\t, line\n, \xc3\xa9, \xe2\x82\xac, \xf0\x9f\x90\x8d"),
            "tab\t, line\n, \xc3\xa9, \xe2\x82\xac, \xf0\x9f\x90\x8d");
  EXPECT_EQ(Shown("\x1b]0;title\x07\x1b[2J"), "\\x1b]0;title\\x07\\x1b[2J");
  EXPECT_EQ(Shown(std::string("a\0b\r\x7f", 5)), "a\\x00b\\x0d\\x7f");
  EXPECT_EQ(Shown("\xc2\x9b"
                  "2J"),
            "\\xc2\\x9b2J");  // a C1 control: another ESC [
}

TEST(TerminalText, BytesThatAreNoUtf8Show) {
  EXPECT_EQ(Shown("\xff\xfe"), "\\xff\\xfe");
  EXPECT_EQ(Shown("\xe2\x82z"), "\\xe2\\x82z");
  EXPECT_EQ(Shown("\xc0\xaf\xed\xa0\x80"), "\\xc0\\xaf\\xed\\xa0\\x80");
  EXPECT_EQ(Shown("end \xf0\x9f\x90"), "end \\xf0\\x9f\\x90");
}

TEST(TerminalText, HoldsBackWhatIsNotComplete) {
  TerminalText text;
  EXPECT_EQ(text.Take("\xe2"), "");
  EXPECT_EQ(text.Take("\x82"), "");
  EXPECT_EQ(text.Take("\xac!"), "\xe2\x82\xac!");
  EXPECT_EQ(text.Rest(), "");
}

}  // namespace
}  // namespace krait
