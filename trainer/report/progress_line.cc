#include "trainer/report/progress_line.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "trainer/report/metrics.h"

namespace krait {
namespace {

constexpr double kSilentSeconds = 1, kRedrawSeconds = 0.1;

bool OnTerminal() { return isatty(STDERR_FILENO) == 1; }

}  // namespace

ProgressLine::ProgressLine(std::string what, Draw draw)
    : what_(std::move(what)), draw_(std::move(draw)), start_(MonotonicSeconds()), drawn_(start_) {}

void ProgressLine::Update(int64_t done, int64_t total) {
  const double now = MonotonicSeconds(), spent = now - start_;
  if (spent < kSilentSeconds || now - drawn_ < kRedrawSeconds || done <= 0 || total <= 0) return;
  drawn_ = now;
  const double share = std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0);
  draw_(absl::StrFormat("%s %.0f%% | ETA %s", what_, 100 * share,
                        FormatDuration(spent / share * (1 - share))));
}

ProgressLine::Draw ProgressLine::OnStandardError(double every) {
  if (!OnTerminal()) {
    return [every, last = MonotonicSeconds()](const std::string& line) mutable {
      const double now = MonotonicSeconds();
      if (now - last < every) return;
      last = now;
      std::fprintf(stderr, "krait: %s\n", line.c_str());
    };
  }
  return [](const std::string& line) { std::fprintf(stderr, "\r\033[K%s", line.c_str()); };
}

void ProgressLine::ClearStandardError() {
  if (OnTerminal()) std::fputs("\r\033[K", stderr);
}

}  // namespace krait
