#include "trainer/tools/choice_task.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
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

namespace {

// Of every choice of one rank's items: -log p, and how many tokens it has.
struct Score {
  double loss = 0, tokens = 0;
};

// Those of items rank, rank + ranks, ..., one after another.
absl::StatusOr<std::vector<Score>> ScoreItems(const std::vector<ChoiceItem>& items, size_t rank,
                                              size_t ranks, Tokenizer* tokenizer,
                                              InferenceModel* model, const Progress& progress) {
  // Passes of one length together: each length needs memory of its own.
  std::map<int64_t, std::vector<std::pair<size_t, Row>>> rows;
  int64_t total = 0, done = 0;
  for (size_t i = rank; i < items.size(); i += ranks) {
    for (size_t c = 0; c < items[i].choices.size(); ++c) {
      Row row;
      KRAIT_ASSIGN_OR_RETURN(row, Encode(items[i], c, tokenizer));
      row.item = i;
      row.choice = c;
      const auto length = std::bit_ceil(std::max<size_t>(16, row.tokens.size()));
      rows[static_cast<int64_t>(length)].emplace_back(static_cast<size_t>(total++), std::move(row));
    }
  }
  std::vector<Score> scores(static_cast<size_t>(total));
  for (const auto& [length, group] : rows) {
    const Evaluator evaluator = model->ForEvaluate({.batch = 1, .seq_len = length});
    for (const auto& [at, row] : group) {
      if (progress) KRAIT_RETURN_IF_ERROR(progress(done++, total));
      const double loss = Loss(row, length, evaluator);
      if (!std::isfinite(loss)) {
        return Error(ExitCode::kNumerics,
                     absl::StrFormat("choice %d of item %d has no finite probability",
                                     row.choice + 1, row.item + 1));
      }
      scores[at] = {loss, static_cast<double>(row.tokens.size() - row.begin)};
    }
  }
  return scores;
}

}  // namespace

absl::StatusOr<ChoiceResult> ScoreChoices(const std::vector<ChoiceItem>& items,
                                          Tokenizer* tokenizer, InferenceModel* model,
                                          const Progress& progress, World* given) {
  World* const world = OrAlone(given);
  const auto ranks = static_cast<size_t>(world->size());
  const auto mine =
      ScoreItems(items, static_cast<size_t>(world->rank()), ranks, tokenizer, model, progress);
  KRAIT_RETURN_IF_ERROR(Agree(world, mine.status()));
  const std::vector<std::string> all = world->AllGather(
      std::string_view(reinterpret_cast<const char*>(mine->data()), mine->size() * sizeof(Score)));
  std::vector<std::vector<double>> losses;
  std::vector<double> right_tokens;
  std::vector<size_t> read(ranks);
  for (size_t i = 0; i < items.size(); ++i) {
    losses.emplace_back();
    for (size_t c = 0; c < items[i].choices.size(); ++c) {
      Score score;
      std::memcpy(&score, all[i % ranks].data() + read[i % ranks]++ * sizeof(Score), sizeof(Score));
      losses.back().push_back(score.loss);
      if (c == items[i].answer) right_tokens.push_back(score.tokens);
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
    tokens += right_tokens[i];
  }
  result.chance /= static_cast<double>(items.size());
  result.loss /= tokens;
  return result;
}

}  // namespace krait
