// Sampled bytes as a terminal may be shown them.
#ifndef KRAIT_TRAINER_TOOLS_TERMINAL_TEXT_H_
#define KRAIT_TRAINER_TOOLS_TERMINAL_TEXT_H_

#include <string>
#include <string_view>

namespace krait {

// Text as it is; control characters other than tab and newline, which could move the cursor or
// rename the window, and bytes that are no UTF-8, as \xNN. Bytes of a character that is not
// complete are held back until it is.
class TerminalText {
 public:
  std::string Take(std::string_view bytes);  // what can be shown by now
  std::string Rest();                        // what was held back

 private:
  std::string held_;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_TERMINAL_TEXT_H_
