#include "kernels/cases/op_cases.h"

#include <set>

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

std::vector<std::string> OpNames() {
  std::set<std::string> names;
  for (const OpCase& c : OpCases()) names.insert(c.op());
  return {names.begin(), names.end()};
}

std::vector<const OpCase*> CasesOf(const std::string& op) {
  std::vector<const OpCase*> cases;
  for (const OpCase& c : OpCases()) {
    if (c.op() == op) cases.push_back(&c);
  }
  return cases;
}

}  // namespace krait::testing
