#include "trainer/ablate/plot.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/number.h"

namespace krait {
namespace {

// In units of the view box, which is as wide on a phone as it is on a screen: text stays readable.
constexpr double kWidth = 480, kHeight = 300;
constexpr double kLeft = 58, kRight = 14, kTop = 44, kBottom = 46, kRowHeight = 24, kLegendRow = 17;
constexpr double kLetter = 6.6;  // of 12 px text, about
constexpr int kColors = 8;

struct Scale {
  double low = 0, high = 1;   // of the data
  double begin = 0, end = 1;  // in the picture
  std::vector<double> ticks;
  double unit = 1;  // ticks are written as multiples of it
  double At(double x) const { return begin + (x - low) / (high - low) * (end - begin); }
};

// Four to seven round ticks, and the range widened to what they need at the least.
void Fit(double low, double high, bool from_zero, bool whole, Scale* scale) {
  if (from_zero) low = std::min(low, 0.0);
  if (!(low <= high)) low = 0, high = 1;
  if (low == high) {
    const double around = low == 0 ? 1 : std::abs(low) * 0.1;
    if (!from_zero) low -= around;
    high += around;
  }
  const double margin = (high - low) * 0.04;
  if (!from_zero || low < 0) low -= margin;
  high += margin;
  const double rough = (high - low) / 6;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 2.5, 5.0}) {
    if (factor * power >= rough) {
      step = factor * power;
      break;
    }
  }
  if (whole) step = std::max(1.0, std::round(step));
  scale->low = low;
  scale->high = high;
  for (double k = std::ceil(low / step); k * step <= high; ++k) scale->ticks.push_back(k * step);
  const double most = std::max(std::abs(low), std::abs(high));
  for (double unit = 1e18; unit >= 1e3; unit /= 1e3) {
    if (most >= unit) {
      scale->unit = unit;
      break;
    }
  }
}

// "tokens" -> "tokens (×10⁶)".
std::string WithUnit(const std::string& name, double unit) {
  if (unit <= 1) return name;
  static constexpr const char* kDigits[] = {"\u2070", "\u00b9", "\u00b2", "\u00b3", "\u2074",
                                            "\u2075", "\u2076", "\u2077", "\u2078", "\u2079"};
  std::string power;
  for (const char digit : std::to_string(std::lround(std::log10(unit)))) {
    power += kDigits[digit - '0'];
  }
  return absl::StrCat(name, " (\u00d710", power, ")");
}

std::string Digits(double x) { return absl::StrFormat("%.6g", std::abs(x) < 1e-12 ? 0 : x); }

std::string Color(int color) { return absl::StrCat("c", color % kColors); }

// Lines beyond the colours differ by their dashes.
std::string Dashes(int color) {
  static constexpr const char* kPatterns[] = {"", "6 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2"};
  const auto pattern = static_cast<size_t>(color / kColors) % std::size(kPatterns);
  return pattern == 0 ? "" : absl::StrCat(" stroke-dasharray=\"", kPatterns[pattern], "\"");
}

std::string Shorter(const std::string& text, size_t most) {
  // Names are mostly ASCII; a cut inside a character would be no text.
  if (text.size() <= most) return text;
  size_t end = most - 1;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "\u2026";
}

class Painter {
 public:
  Painter(const Plot& plot, bool alone) : plot_(plot), alone_(alone) {}

  std::string Paint() {
    Layout();
    Frame();
    if (plot_.rows) {
      Rows();
    } else {
      Lines();
      Points();
    }
    Legend();
    return absl::StrFormat(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 %g %g\" "
        "role=\"img\" aria-label=\"%s\">%s%s</svg>",
        kWidth, height_, XmlText(plot_.title),
        alone_ ? absl::StrFormat("<style>%s</style><rect class=\"page\" width=\"%g\" "
                                 "height=\"%g\"/>",
                                 PlotStyle(), kWidth, height_)
               : "",
        out_);
  }

 private:
  void Layout() {
    left_ = kLeft;
    bottom_ = kHeight - kBottom;
    if (plot_.rows) {
      size_t longest = 0;
      for (const PlotPoint& point : plot_.points) longest = std::max(longest, point.name.size());
      left_ = std::clamp(16 + kLetter * static_cast<double>(longest), 60.0, 200.0);
      bottom_ = kTop + kRowHeight * std::max<double>(2, static_cast<double>(plot_.points.size()));
    }
    constexpr double kNone = std::numeric_limits<double>::infinity();
    double x_low = kNone, x_high = -kNone, y_low = kNone, y_high = -kNone;
    const auto see = [&](double x, double y, double x_around, double y_around) {
      x_low = std::min(x_low, x - x_around);
      x_high = std::max(x_high, x + x_around);
      y_low = std::min(y_low, y - y_around);
      y_high = std::max(y_high, y + y_around);
    };
    for (const PlotLine& line : plot_.lines) {
      for (const auto& [x, y] : line.points) see(x, y, 0, 0);
    }
    for (const PlotPoint& point : plot_.points) {
      see(point.x, point.y, plot_.rows ? point.spread : 0, plot_.rows ? 0 : point.spread);
    }
    Fit(x_low, x_high, plot_.x_from_zero, plot_.whole_x, &x_);
    x_.begin = left_;
    x_.end = kWidth - kRight;
    Fit(y_low, y_high, plot_.y_from_zero, false, &y_);
    y_.begin = bottom_;
    y_.end = kTop;
    height_ = bottom_ + kBottom;
  }

  void Text(double x, double y, const std::string& text, const std::string& attributes) {
    absl::StrAppendFormat(&out_, "<text x=\"%.1f\" y=\"%.1f\"%s>%s</text>", x, y,
                          attributes.empty() ? "" : " " + attributes, XmlText(text));
  }

  void Frame() {
    Text(8, 17, plot_.title, "class=\"head\"");
    if (!plot_.note.empty()) Text(8, 33, Shorter(plot_.note, 76), "class=\"soft\"");
    for (const double tick : x_.ticks) {
      absl::StrAppendFormat(&out_, "<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>", x_.At(tick),
                            bottom_, kTop);
      Text(x_.At(tick), bottom_ + 16, Digits(tick / x_.unit), "text-anchor=\"middle\"");
    }
    Text((x_.begin + x_.end) / 2, bottom_ + 35, WithUnit(plot_.x, x_.unit),
         "text-anchor=\"middle\" class=\"axis\"");
    if (plot_.rows) return;
    for (const double tick : y_.ticks) {
      absl::StrAppendFormat(&out_, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>", x_.begin,
                            y_.At(tick), x_.end);
      Text(x_.begin - 6, y_.At(tick) + 4, Digits(tick / y_.unit), "text-anchor=\"end\"");
    }
    const double middle = (y_.begin + y_.end) / 2;
    absl::StrAppendFormat(
        &out_,
        "<text class=\"axis\" text-anchor=\"middle\" transform=\"translate(13 %.1f) "
        "rotate(-90)\">%s</text>",
        middle, XmlText(WithUnit(plot_.y, y_.unit)));
  }

  void Lines() {
    for (const PlotLine& line : plot_.lines) {
      if (line.points.empty()) continue;
      std::string path;
      char command = 'M';
      for (const auto& [x, y] : line.points) {
        absl::StrAppendFormat(&path, "%c%.1f %.1f", command, x_.At(x), y_.At(y));
        command = 'L';
      }
      absl::StrAppendFormat(&out_, "<path class=\"line %s%s\"%s d=\"%s\"><title>%s</title></path>",
                            Color(line.color), line.thin ? " thin" : "", Dashes(line.color), path,
                            XmlText(line.name));
      if (!line.marked) continue;
      for (const auto& [x, y] : line.points) Dot(x_.At(x), y_.At(y), line.color, line.name, x, y);
    }
  }

  void Dot(double x, double y, int color, const std::string& name, double value_x, double value_y) {
    absl::StrAppendFormat(
        &out_,
        "<circle class=\"dot %s\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"><title>%s: %s, %s"
        "</title></circle>",
        Color(color), x, y, XmlText(name), Digits(value_x), Digits(value_y));
  }

  void Bar(double x1, double y1, double x2, double y2, int color) {
    absl::StrAppendFormat(&out_, "<path class=\"line %s\" d=\"M%.1f %.1fL%.1f %.1f\"/>",
                          Color(color), x1, y1, x2, y2);
  }

  void Points() {
    std::vector<PlotPoint> joined;
    for (const PlotPoint& point : plot_.points) {
      if (point.joined) joined.push_back(point);
    }
    std::sort(joined.begin(), joined.end(),
              [](const PlotPoint& a, const PlotPoint& b) { return a.x < b.x; });
    std::string path;
    for (const PlotPoint& point : joined) {
      absl::StrAppendFormat(&path, "%c%.1f %.1f", path.empty() ? 'M' : 'L', x_.At(point.x),
                            y_.At(point.y));
    }
    if (joined.size() > 1) absl::StrAppendFormat(&out_, "<path class=\"front\" d=\"%s\"/>", path);
    for (const PlotPoint& point : plot_.points) {
      const double x = x_.At(point.x), y = y_.At(point.y);
      if (point.spread > 0) {
        Bar(x, y_.At(point.y - point.spread), x, y_.At(point.y + point.spread), point.color);
      }
      Dot(x, y, point.color, point.name, point.x, point.y);
    }
  }

  void Rows() {
    double y = kTop + kRowHeight / 2;
    const auto letters = static_cast<size_t>((left_ - 12) / kLetter);
    for (const PlotPoint& point : plot_.points) {
      const double x = x_.At(point.x);
      Text(left_ - 8, y + 4, Shorter(point.name, letters), "text-anchor=\"end\"");
      if (point.spread > 0) {
        Bar(x_.At(point.x - point.spread), y, x_.At(point.x + point.spread), y, point.color);
      }
      absl::StrAppendFormat(
          &out_,
          "<circle class=\"dot %s\" cx=\"%.1f\" cy=\"%.1f\" r=\"4.5\"><title>%s: %s%s"
          "</title></circle>",
          Color(point.color), x, y, XmlText(point.name), Digits(point.x),
          point.spread > 0 ? " \u00b1 " + Digits(point.spread) : "");
      y += kRowHeight;
    }
  }

  void Legend() {
    if (plot_.rows) return;
    double x = left_, y = height_ + 6;
    bool any = false;
    const auto entry = [&](const std::string& name, int color, bool dot) {
      const std::string text = Shorter(name, 44);
      const double width = 26 + kLetter * static_cast<double>(text.size()) + 12;
      if (any && x + width > kWidth) {
        x = left_;
        y += kLegendRow;
      }
      if (dot) {
        absl::StrAppendFormat(&out_, "<circle class=\"dot %s\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>",
                              Color(color), x + 10, y - 4);
      } else {
        absl::StrAppendFormat(&out_, "<path class=\"line %s\"%s d=\"M%.1f %.1fh20\"/>",
                              Color(color), Dashes(color), x, y - 4);
      }
      Text(x + 26, y, text, "");
      x += width;
      any = true;
    };
    for (const PlotLine& line : plot_.lines) {
      if (!line.name.empty() && !line.thin) entry(line.name, line.color, false);
    }
    for (const PlotPoint& point : plot_.points) entry(point.name, point.color, true);
    if (any) height_ = y + 12;
  }

  const Plot& plot_;
  const bool alone_;
  Scale x_, y_;
  double left_ = 0, bottom_ = 0, height_ = 0;
  std::string out_;
};

}  // namespace

std::string PlotSvg(const Plot& plot, bool alone) { return Painter(plot, alone).Paint(); }

std::string PlotStyle() {
  // Eight colours that those who see red and green alike can tell apart (after Okabe and Ito),
  // darker or lighter so that they stand out from either page.
  return ":root{--page:#ffffff;--ink:#1c2126;--soft:#5b6570;--grid:#e3e7eb;--c0:#0b66b0;"
         "--c1:#c2500a;--c2:#00795a;--c3:#a8428f;--c4:#8a6d00;--c5:#1d8fc4;--c6:#7a4a2b;"
         "--c7:#4b4fb5}"
         "@media(prefers-color-scheme:dark){:root{--page:#14181c;--ink:#e8ecf0;--soft:#9aa5b0;"
         "--grid:#2b323a;--c0:#5aaef0;--c1:#f08a4b;--c2:#3fc79a;--c3:#e08ac8;--c4:#e0c04a;"
         "--c5:#8ad4f5;--c6:#c99a72;--c7:#a3a6ff}}"
         ".plot text{font:12px system-ui,sans-serif;fill:var(--ink)}"
         ".plot .head{font-size:14px;font-weight:600}"
         ".plot .soft{font-size:11px;fill:var(--soft)}.plot .axis{fill:var(--soft)}"
         ".page{fill:var(--page)}.grid{stroke:var(--grid);fill:none}"
         ".line{fill:none;stroke-width:2;stroke-linejoin:round}.thin{stroke-width:1;opacity:.35}"
         ".front{fill:none;stroke:var(--soft);stroke-dasharray:4 3}"
         ".dot{stroke:var(--page);stroke-width:1}"
         ".line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}"
         ".line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}"
         ".line.c6{stroke:var(--c6)}.line.c7{stroke:var(--c7)}"
         ".dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}"
         ".dot.c3{fill:var(--c3)}.dot.c4{fill:var(--c4)}.dot.c5{fill:var(--c5)}"
         ".dot.c6{fill:var(--c6)}.dot.c7{fill:var(--c7)}";
}

std::string XmlText(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

}  // namespace krait
