// `krait ablate report`: what the runs of a sweep came to, as far as they have.
#ifndef KRAIT_TRAINER_ABLATE_REPORT_H_
#define KRAIT_TRAINER_ABLATE_REPORT_H_

#include <string>

#include "trainer/ablate/sweep_plan.h"

namespace krait {

// Writes into OUT: runs.csv (a row per run), cells.csv (a row per cell), report.md, report.html
// (one page that needs no network) and plots/NAME.svg (the page's plots, each for itself). Returns
// the table of cells and where the page is, for a terminal.
absl::StatusOr<std::string> WriteSweepReport(const SweepPlan& plan);

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_REPORT_H_
