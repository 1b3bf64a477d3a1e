#include "kernels/cases/op_cases.h"

namespace krait::testing {

const std::vector<OpCase>& OpCases() {
  static const std::vector<OpCase> cases = [] {
    std::vector<OpCase> all;
    AddElementwiseCases(&all);
    AddNormCases(&all);
    AddProductCases(&all);
    AddMoeCases(&all);
    AddLossCases(&all);
    AddSequenceCases(&all);
    return all;
  }();
  return cases;
}

}  // namespace krait::testing
