// How far long work is, as a line that is redrawn in place.
#ifndef KRAIT_TRAINER_REPORT_PROGRESS_LINE_H_
#define KRAIT_TRAINER_REPORT_PROGRESS_LINE_H_

#include <cstdint>
#include <functional>
#include <string>

namespace krait {

// "loading 34% | ETA 12s": nothing in the first second of the work, then at most ten times a
// second. Work that has not reached its first report yet is shown by Begin().
class ProgressLine {
 public:
  using Draw = std::function<void(const std::string& line)>;
  ProgressLine(std::string what, Draw draw);

  void Begin() { draw_(what_ + " ..."); }
  void Update(int64_t done, int64_t total);

  // Draws on standard error: on a terminal in place, else a line of its own every `every` seconds.
  static Draw OnStandardError(double every = 10);
  // Clears that line.
  static void ClearStandardError();

 private:
  std::string what_;
  Draw draw_;
  double start_, drawn_;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_REPORT_PROGRESS_LINE_H_
