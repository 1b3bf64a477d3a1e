// Plots as SVG: lines, and points with error bars. Axes have names with units; every mark has a
// title, which browsers show beside the pointer. Colours are the CSS variables of PlotStyle(),
// which has a light and a dark set.
#ifndef KRAIT_TRAINER_ABLATE_PLOT_H_
#define KRAIT_TRAINER_ABLATE_PLOT_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace krait {

struct PlotLine {
  std::string name = {};  // in the legend, but for thin lines
  int color = 0;          // any number from 0 on
  bool thin = false;
  bool marked = false;  // a dot at each point
  std::vector<std::pair<double, double>> points = {};
};

struct PlotPoint {
  std::string name = {};
  int color = 0;
  double x = 0, y = 0;
  double spread = 0;    // half the length of an error bar; 0: none
  bool joined = false;  // a line goes through all that are, by their x
};

struct Plot {
  std::string title = {}, x = {}, y = {};  // x, y: along the axes, with units
  std::string note = {};                   // a line below the title
  bool x_from_zero = false, y_from_zero = false;
  bool whole_x = false;  // ticks at whole numbers only
  bool rows = false;     // points are rows, named at the left; x is the value, with its error bar
  std::vector<PlotLine> lines = {};
  std::vector<PlotPoint> points = {};
};

// An <svg> element; `alone`: with the style inside, as a file of its own.
std::string PlotSvg(const Plot& plot, bool alone);

// CSS: the colours by --c0 ... --c7, --ink, --soft, --page, and what marks look like.
std::string PlotStyle();

// & < > " as entities.
std::string XmlText(const std::string& text);

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_PLOT_H_
