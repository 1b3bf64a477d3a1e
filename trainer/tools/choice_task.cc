#include "trainer/tools/choice_task.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_format.h"
#include "kernels/activation.h"
#include "kernels/base/file.h"
#include "kernels/transfer.h"

namespace krait {
namespace {

constexpr int64_t kMaxTaskBytes = int64_t{1} << 30;
constexpr size_t kMaxErrors = 20;

// What is wrong with a record; "" where nothing is.
std::string Parse(const nlohmann::json& record, ChoiceItem* item) {
  if (!record.is_object()) return "no JSON object";
  const auto context = record.find("context"), choices = record.find("choices"),
             answer = record.find("answer");
  if (context == record.end() || !context->is_string() || context->get<std::string>().empty()) {
    return "\"context\" is no text, or empty";
  }
  if (choices == record.end() || !choices->is_array() || choices->size() < 2) {
    return "\"choices\" is no list of at least 2 texts";
  }
  for (const auto& choice : *choices) {
    if (!choice.is_string() || choice.get<std::string>().empty()) {
      return "\"choices\" has an entry that is no text, or empty";
    }
    item->choices.push_back(choice.get<std::string>());
  }
  if (answer == record.end() || !answer->is_number_unsigned() ||
      answer->get<uint64_t>() >= choices->size()) {
    return absl::StrFormat("\"answer\" is no index from 0 to %d", choices->size() - 1);
  }
  item->context = context->get<std::string>();
  item->answer = answer->get<size_t>();
  return "";
}

// A pass to be made: tokens, of which those from `begin` on are the choice.
struct Row {
  std::vector<int32_t> tokens;
  size_t begin = 0;
  size_t item = 0, choice = 0;
};

absl::StatusOr<Row> Encode(const ChoiceItem& item, size_t choice, Tokenizer* tokenizer) {
  std::vector<int32_t> context, whole;
  KRAIT_RETURN_IF_ERROR(tokenizer->Encode(item.context, &context));
  KRAIT_RETURN_IF_ERROR(tokenizer->Encode(item.context + item.choices[choice], &whole));
  Row row;
  row.tokens = tokenizer->prefix();
  row.tokens.insert(row.tokens.end(), whole.begin(), whole.end());
  // A choice that melts into the context's last token is that token.
  const size_t own = std::min(context.size(), whole.size() - 1);
  row.begin = std::max<size_t>(1, tokenizer->prefix().size() + own);
  return row;
}

// Sum of -log p of the row's choice, in a pass of `length` tokens.
double Loss(const Row& row, int64_t length, const Evaluator& evaluator) {
  TokenBatch batch;
  batch.sequences = 1;
  batch.seq_len = length;
  batch.tokens = row.tokens;
  batch.tokens.resize(static_cast<size_t>(length), 0);  // behind the choice: nothing sees them
  batch.targets.assign(static_cast<size_t>(length), -1);
  batch.doc_start.assign(static_cast<size_t>(length), 0);
  for (size_t t = row.begin; t < row.tokens.size(); ++t) batch.targets[t - 1] = row.tokens[t];
  const Context& ctx = evaluator.ctx;
  Fill(evaluator.sums, 0, ctx);
  evaluator.model->Evaluate(evaluator.batch.Of(batch, 0, 1, ctx), evaluator.sums, ctx);
  return PassSumsOf(DownloadDoubles(evaluator.sums, ctx)).cross_entropy;
}

}  // namespace

absl::StatusOr<std::vector<ChoiceItem>> ReadChoiceTask(const std::string& path) {
  std::string text;
  KRAIT_ASSIGN_OR_RETURN(text, ReadFile(path, kMaxTaskBytes, ExitCode::kData));
  std::vector<ChoiceItem> items;
  ErrorList errors;
  std::istringstream lines(text);
  int64_t number = 0;
  for (std::string line; std::getline(lines, line) && errors.errors().size() < kMaxErrors;) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    ChoiceItem item;
    const std::string wrong =
        Parse(nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false), &item);
    if (wrong.empty()) {
      items.push_back(std::move(item));
    } else {
      errors.Add(ExitCode::kData,
                 absl::StrFormat("%s:%d: %s; a line is {\"context\": TEXT, \"choices\": [TEXT, "
                                 "TEXT], \"answer\": 0}",
                                 path, number, wrong));
    }
  }
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  if (items.empty()) return Error(ExitCode::kData, path + ": no item in it");
  return items;
}

absl::StatusOr<ChoiceResult> ScoreChoices(const std::vector<ChoiceItem>& items,
                                          Tokenizer* tokenizer, InferenceModel* model,
                                          const Progress& progress) {
  // Passes of one length together: each length needs memory of its own.
  std::map<int64_t, std::vector<Row>> rows;
  int64_t total = 0, done = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    for (size_t c = 0; c < items[i].choices.size(); ++c) {
      Row row;
      KRAIT_ASSIGN_OR_RETURN(row, Encode(items[i], c, tokenizer));
      row.item = i;
      row.choice = c;
      const auto length = std::bit_ceil(std::max<size_t>(16, row.tokens.size()));
      rows[static_cast<int64_t>(length)].push_back(std::move(row));
      ++total;
    }
  }
  std::vector<std::vector<double>> losses;
  std::vector<size_t> right_tokens(items.size());
  for (const ChoiceItem& item : items) losses.emplace_back(item.choices.size());
  for (const auto& [length, group] : rows) {
    const Evaluator evaluator = model->ForEvaluate({.batch = 1, .seq_len = length});
    for (const Row& row : group) {
      if (progress) KRAIT_RETURN_IF_ERROR(progress(done++, total));
      const double loss = Loss(row, length, evaluator);
      if (!std::isfinite(loss)) {
        return Error(ExitCode::kNumerics,
                     absl::StrFormat("choice %d of item %d has no finite probability",
                                     row.choice + 1, row.item + 1));
      }
      losses[row.item][row.choice] = loss;
      if (row.choice == items[row.item].answer) {
        right_tokens[row.item] = row.tokens.size() - row.begin;
      }
    }
  }
  ChoiceResult result;
  result.items = static_cast<int64_t>(items.size());
  double tokens = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const ChoiceItem& item = items[i];
    std::vector<double> by_byte;
    for (size_t c = 0; c < item.choices.size(); ++c) {
      by_byte.push_back(losses[i][c] / static_cast<double>(item.choices[c].size()));
    }
    const auto best = [](const std::vector<double>& values) {
      return static_cast<size_t>(std::min_element(values.begin(), values.end()) - values.begin());
    };
    result.correct += best(losses[i]) == item.answer ? 1 : 0;
    result.correct_by_byte += best(by_byte) == item.answer ? 1 : 0;
    result.chance += 1 / static_cast<double>(item.choices.size());
    result.loss += losses[i][item.answer];
    tokens += static_cast<double>(right_tokens[i]);
  }
  result.chance /= static_cast<double>(items.size());
  result.loss /= tokens;
  return result;
}

}  // namespace krait
