#include "trainer/ablate/report.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "trainer/ablate/plot.h"
#include "trainer/ablate/report_plots.h"
#include "trainer/ablate/results.h"
#include "trainer/report/metrics.h"

namespace krait {
namespace {

using State = RunResult::State;
using Row = std::vector<std::string>;

struct Table {
  Row head;
  std::vector<Row> rows;
};

std::string Csv(const Table& table) {
  const auto line = [](const Row& row) {
    std::vector<std::string> fields;
    for (const std::string& field : row) {
      const bool plain = field.find_first_of(",\"\n") == std::string::npos;
      fields.push_back(
          plain ? field : absl::StrCat("\"", absl::StrReplaceAll(field, {{"\"", "\"\""}}), "\""));
    }
    return absl::StrJoin(fields, ",") + "\n";
  };
  std::string out = line(table.head);
  for (const Row& row : table.rows) out += line(row);
  return out;
}

std::string Markdown(const Table& table) {
  const auto line = [](const Row& row) {
    std::vector<std::string> fields;
    for (const std::string& field : row) {
      fields.push_back(absl::StrReplaceAll(field, {{"|", "\\|"}, {"\n", " "}}));
    }
    return absl::StrCat("| ", absl::StrJoin(fields, " | "), " |\n");
  };
  std::string out = line(table.head) + "|";
  for (size_t i = 0; i < table.head.size(); ++i) out += i == 0 ? " --- |" : " ---: |";
  out += "\n";
  for (const Row& row : table.rows) out += line(row);
  return out;
}

std::string Html(const Table& table) {
  std::string out = "<div class=\"wide\"><table><thead><tr>";
  for (const std::string& field : table.head) {
    absl::StrAppend(&out, "<th>", XmlText(field), "</th>");
  }
  out += "</tr></thead><tbody>";
  for (const Row& row : table.rows) {
    out += "<tr>";
    for (const std::string& field : row) absl::StrAppend(&out, "<td>", XmlText(field), "</td>");
    out += "</tr>";
  }
  return out + "</tbody></table></div>";
}

// For a terminal: columns as wide as their widest field.
std::string Plain(const Table& table) {
  std::vector<size_t> widths(table.head.size(), 0);
  // Characters, not bytes.
  const auto length = [](const std::string& text) {
    return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
      return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    }));
  };
  const auto see = [&](const Row& row) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], length(row[i]));
  };
  see(table.head);
  for (const Row& row : table.rows) see(row);
  std::string out;
  const auto line = [&](const Row& row) {
    out += " ";
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string gap(widths[i] - length(row[i]), ' ');
      absl::StrAppend(&out, " ", i == 0 ? row[i] + gap : gap + row[i], " ");
    }
    out += "\n";
  };
  line(table.head);
  for (const Row& row : table.rows) line(row);
  return out;
}

class Reporter {
 public:
  explicit Reporter(const SweepPlan& plan) : plan_(plan), results_(ReadResults(plan)) {}

  absl::StatusOr<std::string> Write() {
    const std::string& out = plan_.sweep.out;
    KRAIT_RETURN_IF_ERROR(MakeDirectories(out + "/plots", ExitCode::kCannotSave));
    const std::vector<std::pair<std::string, Plot>> plots = SweepPlots(plan_, results_);
    const auto write = [&](const std::string& name, const std::string& text) {
      return WriteFileAtomic(out + "/" + name, text, ExitCode::kCannotSave);
    };
    KRAIT_RETURN_IF_ERROR(write("runs.csv", Csv(RunTable())));
    KRAIT_RETURN_IF_ERROR(write("cells.csv", Csv(CellFigures())));
    for (const auto& [name, plot] : plots) {
      KRAIT_RETURN_IF_ERROR(write("plots/" + name + ".svg", PlotSvg(plot, /*alone=*/true) + "\n"));
    }
    KRAIT_RETURN_IF_ERROR(write("report.md", MarkdownReport(plots)));
    KRAIT_RETURN_IF_ERROR(write("report.html", Page(plots)));
    return absl::StrCat("\n", Plain(CellTable()), "\n", absl::StrJoin(Sentences(), "\n"),
                        "\nreport: ", out,
                        "/report.html, report.md, cells.csv, runs.csv, plots/\n");
  }

 private:
  std::string Value(double x) const { return absl::StrFormat("%.4f", x); }
  bool IsBaseline(size_t cell) const { return cell == plan_.sweep.baseline; }

  std::string Difference(size_t i) const {
    const CellResult& cell = results_.cells[i];
    if (IsBaseline(i)) return "baseline";
    if (cell.pairs == 0) return "-";
    const std::string mean = absl::StrFormat("%+.4f", cell.difference);
    if (cell.pairs == 1) return mean + " (one pair)";
    return absl::StrFormat("%s \u00b1 %.4f%s", mean, cell.half_width,
                           cell.significant() ? "" : " n.s.");
  }

  static std::string Balance(const CellResult& cell) {
    double most = 0;
    for (const auto& [layer, value] : cell.imbalance) most = std::max(most, value);
    return most > 0 ? absl::StrFormat("%.2f", most) : "-";
  }

  // Best first.
  std::vector<size_t> Order() const {
    std::vector<size_t> order;
    for (size_t i = 0; i < plan_.cells.size(); ++i) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      const CellResult &x = results_.cells[a], &y = results_.cells[b];
      if (x.runs.empty() != y.runs.empty()) return y.runs.empty();
      return !x.runs.empty() && (plan_.higher_better ? x.mean > y.mean : x.mean < y.mean);
    });
    return order;
  }

  Table CellTable() const {
    Table table;
    table.head = {"cell",     plan_.metric, "runs",        "less the baseline",
                  "active",   "params",     "tokens",      "FLOP",
                  "tokens/s", "cache",      "peak memory", "imbalance"};
    for (const size_t i : Order()) {
      const PlannedCell& planned = plan_.cells[i];
      const CellResult& cell = results_.cells[i];
      const bool any = !cell.runs.empty();
      table.rows.push_back(
          {planned.name,
           !any                   ? "-"
           : cell.runs.size() < 2 ? Value(cell.mean)
                                  : absl::StrCat(Value(cell.mean), " \u00b1 ", Value(cell.spread)),
           absl::StrCat(cell.runs.size(), "/", plan_.sweep.seeds.size()), Difference(i),
           PrintShort(static_cast<double>(planned.params_active)),
           PrintShort(static_cast<double>(planned.params_total)),
           PrintShort(static_cast<double>(planned.tokens)), PrintShort(planned.flops),
           any ? PrintShort(cell.tokens_per_s) : "-", PrintBytes(planned.cache_bytes),
           any ? absl::StrFormat("%.2f GiB", cell.peak_gib) : "-", Balance(cell)});
    }
    return table;
  }

  // The same in full precision.
  Table CellFigures() const {
    Table table;
    table.head = {"cell",          "runs",          plan_.metric,      "spread",
                  "difference",    "half_width_95", "pairs",           "significant",
                  "params_active", "params_total",  "flops_per_token", "tokens",
                  "flops",         "tokens_per_s",  "seconds",         "cache_bytes",
                  "peak_gib",      "imbalance"};
    const auto number = [](double x) { return std::isfinite(x) ? PrintNumber(x) : ""; };
    for (size_t i = 0; i < plan_.cells.size(); ++i) {
      const PlannedCell& planned = plan_.cells[i];
      const CellResult& cell = results_.cells[i];
      const bool any = !cell.runs.empty();
      const auto measured = [&](double x) { return any ? number(x) : ""; };
      table.rows.push_back(
          {planned.name, std::to_string(cell.runs.size()), measured(cell.mean),
           cell.runs.size() > 1 ? number(cell.spread) : "",
           cell.pairs > 0 ? number(cell.difference) : "",
           cell.pairs > 1 ? number(cell.half_width) : "", std::to_string(cell.pairs),
           IsBaseline(i) || cell.pairs < 2 ? ""
           : cell.significant()            ? "yes"
                                           : "no",
           std::to_string(planned.params_active), std::to_string(planned.params_total),
           number(planned.flops_per_token), std::to_string(planned.tokens), number(planned.flops),
           measured(cell.tokens_per_s), measured(cell.seconds), std::to_string(planned.cache_bytes),
           measured(cell.peak_gib), cell.imbalance.empty() ? "" : Balance(cell)});
    }
    return table;
  }

  Table RunTable() const {
    Table table;
    table.head = {"cell",     "seed",         "state",        "step",       "steps",
                  "tokens",   "flops",        "seconds",      plan_.metric, "train_loss",
                  "val_loss", "val_accuracy", "tokens_per_s", "peak_gib",   "exit_code",
                  "error",    "folder"};
    const auto number = [](std::optional<double> x) {
      return x.has_value() && std::isfinite(*x) ? PrintNumber(*x) : std::string();
    };
    for (size_t i = 0; i < plan_.runs.size(); ++i) {
      const PlannedRun& planned = plan_.runs[i];
      const RunResult& run = results_.runs[i];
      const RunSummary& summary = run.summary;
      table.rows.push_back(
          {plan_.cells[planned.cell].name, std::to_string(planned.seed), Name(run.state),
           std::to_string(summary.step),
           std::to_string(plan_.cells[planned.cell].config.train.steps),
           std::to_string(summary.tokens),
           number(static_cast<double>(summary.tokens) * plan_.cells[planned.cell].flops_per_token),
           number(summary.seconds), number(run.value), number(summary.train_loss),
           number(summary.val_loss), number(summary.val_accuracy), number(run.tokens_per_s),
           number(run.peak_gib), std::to_string(summary.exit_code), summary.error, planned.dir});
    }
    return table;
  }

  // What can be said, and what cannot.
  std::vector<std::string> Sentences() const {
    std::vector<std::string> said;
    const size_t finished = results_.Count(State::kFinished);
    said.push_back(
        absl::StrFormat("%d of %d runs are finished%s.", finished, plan_.runs.size(),
                        results_.Count(State::kFailed) > 0
                            ? absl::StrCat(", ", results_.Count(State::kFailed), " failed")
                            : ""));
    const size_t base = plan_.sweep.baseline, best = Order().front();
    const CellResult& cell = results_.cells[best];
    if (cell.runs.empty()) return said;
    std::string sentence = absl::StrCat("Best by ", plan_.metric, ": ", plan_.cells[best].name,
                                        " (", Value(cell.mean), ")");
    if (best == base) {
      absl::StrAppend(&sentence, ", the baseline.");
    } else if (cell.pairs > 1) {
      absl::StrAppendFormat(&sentence,
                            ", %+.4f from %s (95 %% interval of the paired difference "
                            "over %d seeds \u00b1 %.4f: %s).",
                            cell.difference, plan_.cells[base].name, cell.pairs, cell.half_width,
                            cell.significant() ? "significant" : "not significant");
    } else {
      absl::StrAppend(&sentence, ".");
    }
    said.push_back(sentence);
    if (plan_.sweep.seeds.size() < 2) {
      said.push_back("One seed: differences may be chance, and no claim is made.");
    } else {
      said.push_back(
          "n.s.: the 95 % interval of the paired difference (same seeds, Student's t) "
          "holds 0. Each cell is compared by itself; of many some differ by chance.");
    }
    return said;
  }

  std::vector<std::string> Method() const {
    const Sweep& sweep = plan_.sweep;
    std::vector<std::string> said;
    said.push_back(
        absl::StrFormat("Sweep %s over %s; seeds %s; %s (%s is better), the last value "
                        "of each run; \u00b1 the standard deviation over seeds.",
                        sweep.path, sweep.config, absl::StrJoin(sweep.seeds, ", "), plan_.metric,
                        plan_.higher_better ? "higher" : "lower"));
    double steps_off = 0, size_off = 0;
    for (const PlannedCell& cell : plan_.cells) {
      steps_off = std::max(steps_off, std::abs(cell.steps_off));
      size_off = std::max(size_off, std::abs(cell.size_off));
    }
    if (sweep.steps.kind != EqualSteps::kNone) {
      said.push_back(absl::StrFormat("Held equal by the number of steps: %s, within %.2f %%.",
                                     sweep.steps.kind == EqualSteps::kTokens ? "tokens"
                                     : sweep.steps.kind == EqualSteps::kFlops
                                         ? "FLOP"
                                         : "seconds as measured before (what runs took "
                                           "stands in the tables)",
                                     100 * steps_off));
    }
    if (sweep.size.kind != EqualSize::kNone) {
      said.push_back(absl::StrFormat(
          "Held equal by the feed-forward width: %s parameters, within "
          "%.2f %%.",
          sweep.size.kind == EqualSize::kActive ? "active" : "total", 100 * size_off));
    }
    said.push_back(
        "FLOP: forward and backward, as `krait plan` counts them. Cache: keys, values "
        "and states of one sequence of the training length. Imbalance: rows of the "
        "busiest expert over the mean, of the worst layer (1: balanced).");
    return said;
  }

  Table Failed() const {
    Table table;
    table.head = {"cell", "seed", "state", "step", "why"};
    for (size_t i = 0; i < plan_.runs.size(); ++i) {
      const RunResult& run = results_.runs[i];
      if (run.state == State::kFinished && run.value.has_value()) continue;
      table.rows.push_back(
          {plan_.cells[plan_.runs[i].cell].name, std::to_string(plan_.runs[i].seed),
           Name(run.state), std::to_string(run.summary.step),
           run.state == State::kFinished ? plan_.metric + " is not there, or not finite"
                                         : run.summary.error});
    }
    return table;
  }

  std::string MarkdownReport(const std::vector<std::pair<std::string, Plot>>& plots) const {
    std::string out =
        absl::StrCat("# ", plan_.sweep.title, "\n\n", absl::StrJoin(Sentences(), "\n"), "\n\n",
                     Markdown(CellTable()), "\n");
    for (const auto& [name, plot] : plots) {
      absl::StrAppend(&out, "![", plot.title, "](plots/", name, ".svg)\n");
    }
    absl::StrAppend(&out, "\n", absl::StrJoin(Method(), "\n"), "\n");
    if (const Table failed = Failed(); !failed.rows.empty()) {
      absl::StrAppend(&out, "\n## Runs without a result\n\n", Markdown(failed));
    }
    return out;
  }

  std::string Page(const std::vector<std::pair<std::string, Plot>>& plots) const {
    std::string out = absl::StrCat(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
        "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
        "<meta name=\"color-scheme\" content=\"light dark\"><link rel=\"icon\" href=\"data:,\">"
        "<title>",
        XmlText(plan_.sweep.title), "</title><style>", PlotStyle(),
        "body{margin:0 auto;max-width:1180px;padding:16px;background:var(--page);color:var(--ink);"
        "font:15px/1.5 system-ui,sans-serif}h1{font-size:24px;line-height:1.25;margin:8px 0}"
        "h2{font-size:18px;margin:28px 0 8px}p{margin:6px 0}.note{color:var(--soft);font-size:13px}"
        ".wide{overflow-x:auto;margin:14px 0}table{border-collapse:collapse;white-space:nowrap;"
        "font-size:13px;font-variant-numeric:tabular-nums}"
        "th,td{padding:5px 8px;border-bottom:1px solid var(--grid);text-align:right}"
        "th{color:var(--soft);font-weight:600}"
        "th:first-child,td:first-child{text-align:left;position:sticky;left:0;"
        "background:var(--page)}td:last-child{white-space:normal}"
        ".plots{display:grid;gap:18px;"
        "grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}"
        ".plots svg{width:100%;height:auto}</style></head><body><h1>",
        XmlText(plan_.sweep.title), "</h1>");
    for (const std::string& said : Sentences()) absl::StrAppend(&out, "<p>", XmlText(said), "</p>");
    absl::StrAppend(&out, Html(CellTable()), "<div class=\"plots\">");
    for (const auto& [name, plot] : plots) {
      absl::StrAppend(&out, "\n<figure style=\"margin:0\">", PlotSvg(plot, /*alone=*/false),
                      "</figure>");
    }
    out += "</div>";
    if (const Table failed = Failed(); !failed.rows.empty()) {
      absl::StrAppend(&out, "<h2>Runs without a result</h2>", Html(failed));
    }
    out += "<h2>How this was made</h2>";
    for (const std::string& said : Method()) {
      absl::StrAppend(&out, "<p class=\"note\">", XmlText(said), "</p>");
    }
    return out + "</body></html>\n";
  }

  const SweepPlan& plan_;
  const SweepResults results_;
};

}  // namespace

absl::StatusOr<std::string> WriteSweepReport(const SweepPlan& plan) {
  return Reporter(plan).Write();
}

}  // namespace krait
