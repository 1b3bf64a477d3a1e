// The plots of a sweep's report.
#ifndef KRAIT_TRAINER_ABLATE_REPORT_PLOTS_H_
#define KRAIT_TRAINER_ABLATE_REPORT_PLOTS_H_

#include <string>
#include <utility>
#include <vector>

#include "trainer/ablate/plot.h"
#include "trainer/ablate/results.h"

namespace krait {

// With the names of their files; those without data are left out. Curves are thinned to means of
// consecutive records, so that a page of 50 runs stays small.
std::vector<std::pair<std::string, Plot>> SweepPlots(const SweepPlan& plan,
                                                     const SweepResults& results);

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_REPORT_PLOTS_H_
