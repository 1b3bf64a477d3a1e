// A call of every op at odd sizes: one token, odd widths, strided rows, empty experts.
#ifndef KRAIT_TESTS_KERNELS_CASES_OP_CASES_H_
#define KRAIT_TESTS_KERNELS_CASES_OP_CASES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "support/op_case.h"

namespace krait::testing {

const std::vector<OpCase>& OpCases();
// The names of the ops, each once, and the cases of one.
std::vector<std::string> OpNames();
std::vector<const OpCase*> CasesOf(const std::string& op);

// Elementwise ops and sums, norms, products, experts, losses, ops along time.
void AddElementwiseCases(std::vector<OpCase>* cases);
void AddNormCases(std::vector<OpCase>* cases);
void AddProductCases(std::vector<OpCase>* cases);
void AddMoeCases(std::vector<OpCase>* cases);
void AddLossCases(std::vector<OpCase>* cases);
void AddSequenceCases(std::vector<OpCase>* cases);

// "3 x 5"
inline std::string Sizes(const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : " x ") + std::to_string(size);
  return text;
}

// Rows of tokens sorted by expert with every expert's first row at a multiple of 128, as CUDA wants
// them (and the CPU allows): choices [tokens, top_k] of four experts of which expert 1 gets none.
struct SortedRows {
  SortedRows(int64_t tokens, int64_t top_k);
  int64_t tokens, top_k, experts = 4;
  int64_t used;  // rows in use: offsets[experts]
  std::vector<double> choice, row_of, offsets;
  std::vector<double> source;  // of the rows in use; -1: padding
  // The values of `initial` in rows that hold a token, zeros in rows of padding, `unused` in rows
  // that are not in use.
  Initial Rows(Initial initial, double unused) const;
};

}  // namespace krait::testing

#endif  // KRAIT_TESTS_KERNELS_CASES_OP_CASES_H_
