#include "trainer/train/layer_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_format.h"
#include "kernels/activation.h"
#include "kernels/optimizer.h"
#include "kernels/transfer.h"
#include "model/names.h"

namespace krait {
namespace {

constexpr int64_t kRows = 4096, kDtRows = 64;

// The number behind the dot of a probe's name.
size_t IndexOf(const std::string& name) {
  return static_cast<size_t>(std::stoll(name.substr(name.rfind('.') + 1)));
}

std::string NameOf(const Sublayer& sublayer, const char* what) {
  return absl::StrFormat("layers/%02d_%s/%s", sublayer.layer, Name(sublayer.kind), what);
}

// This rank's part of a storage, flat.
std::vector<float> StorageValues(const Trainer& trainer, const std::string& name) {
  const Weights& weights = trainer.weights();
  const LocalStorage& storage =
      weights.layout().storages()[static_cast<size_t>(weights.table().FindStorage(name))];
  return DownloadFloats(weights.FlatWeight(storage.flat).Slice(0, storage.offset, storage.numel()),
                        trainer.ctx());
}

void AddDt(const Sublayer& sublayer, const Tensor& dt_raw, const Trainer& trainer,
           std::vector<Metric>* metrics) {
  const std::string prefix = SublayerPrefix(SublayerKind::kMamba, sublayer.layer);
  const std::vector<float> bias = StorageValues(trainer, prefix + "dt_proj.bias");
  std::vector<double> steps;
  const int64_t stride = std::max<int64_t>(1, dt_raw.dim(0) / kDtRows);
  for (int64_t row = 0; row < dt_raw.dim(0); row += stride) {
    const std::vector<float> values = DownloadFloats(dt_raw.Slice(0, row, 1), trainer.ctx());
    for (size_t i = 0; i < values.size(); ++i) {
      const double x = static_cast<double>(values[i]) + bias[i];
      steps.push_back(x > 30 ? x : std::log1p(std::exp(x)));
    }
  }
  for (const auto& [name, share] :
       {std::pair{"dt_p05", 0.05}, std::pair{"dt_p50", 0.5}, std::pair{"dt_p95", 0.95}}) {
    const auto at =
        steps.begin() + static_cast<int64_t>(share * static_cast<double>(steps.size() - 1));
    std::nth_element(steps.begin(), at, steps.end());
    metrics->push_back({NameOf(sublayer, name), *at});
  }
  const std::vector<float> a_log = StorageValues(trainer, prefix + "A_log");
  metrics->push_back({NameOf(sublayer, "min_a"), std::exp(static_cast<double>(*std::min_element(
                                                     a_log.begin(), a_log.end())))});
}

void AddRouter(const Sublayer& sublayer, const std::vector<float>& logits, const MoeSpec& moe,
               std::vector<Metric>* metrics) {
  const auto experts = static_cast<size_t>(moe.experts);
  const size_t rows = logits.size() / experts;
  std::vector<double> load(experts);
  std::vector<size_t> order(experts);
  double entropy = 0;
  for (size_t row = 0; row < rows; ++row) {
    const float* const of = logits.data() + row * experts;
    const double most = *std::max_element(of, of + experts);
    double sum = 0, weighted = 0;
    for (size_t e = 0; e < experts; ++e) {
      const double p = std::exp(of[e] - most);
      sum += p;
      weighted += p * (of[e] - most);
    }
    entropy += std::log(sum) - weighted / sum;
    std::iota(order.begin(), order.end(), size_t{0});
    std::partial_sort(
        order.begin(), order.begin() + moe.top_k, order.end(),
        [of](size_t a, size_t b) { return of[a] > of[b] || (of[a] == of[b] && a < b); });
    for (int64_t k = 0; k < moe.top_k; ++k) load[order[static_cast<size_t>(k)]] += 1;
  }
  const double mean =
      static_cast<double>(rows) * static_cast<double>(moe.top_k) / static_cast<double>(experts);
  metrics->push_back({NameOf(sublayer, "entropy"), entropy / static_cast<double>(rows)});
  metrics->push_back(
      {NameOf(sublayer, "load_min"), *std::min_element(load.begin(), load.end()) / mean});
  metrics->push_back(
      {NameOf(sublayer, "load_max"), *std::max_element(load.begin(), load.end()) / mean});
}

// "the output of layer 3's mamba" of "output.6".
std::string InWords(const std::string& name, const ModelSpec& model) {
  const std::string kind = name.substr(0, name.find('.'));
  if (name == "gradient.head") return "the gradient of the head's input";
  if (name == "hidden_states.0") return "the embedding";
  if (kind == "hidden_states") {
    const auto layer = static_cast<int64_t>(IndexOf(name));
    return layer == model.n_layers ? "the output of the final norm"
                                   : absl::StrFormat("the stream before layer %d", layer);
  }
  const Sublayer& sublayer = model.sublayers[IndexOf(name)];
  return absl::StrFormat("the %s of layer %d's %s%s", kind == "gradient" ? "gradient" : "output",
                         sublayer.layer, Name(sublayer.kind), kind == "gradient" ? " input" : "");
}

}  // namespace

std::vector<Metric> LayerStatistics(Trainer* trainer, const TokenBatch& batch) {
  const ModelSpec& model = trainer->config().model;
  const Evaluator evaluator = trainer->evaluator();
  std::vector<Metric> metrics;
  std::vector<const Sublayer*> routed;
  for (const Sublayer& sublayer : model.sublayers) {
    if (sublayer.kind == SublayerKind::kMoe) routed.push_back(&sublayer);
  }
  ProbeSink sink;
  sink.sublayers = true;
  sink.on_tensor = [&](const std::string& name, Tensor t) {
    const std::string kind = name.substr(0, name.find('.'));
    const Tensor rows = t.Slice(0, 0, std::min(kRows, t.dim(0)));
    if (kind == "dt_raw") {
      AddDt(model.sublayers[IndexOf(name)], rows, *trainer, &metrics);
    } else if (kind == "router_logits") {
      AddRouter(*routed[IndexOf(name)], DownloadFloats(rows, evaluator.ctx), model.moe, &metrics);
    } else if (kind == "output") {
      double most = 0;
      for (const float x : DownloadFloats(rows, evaluator.ctx)) {
        if (!(std::fabs(x) <= most)) most = std::fabs(x);  // NaN, too
      }
      metrics.push_back({NameOf(model.sublayers[IndexOf(name)], "max_abs"), most});
    }
  };
  evaluator.model->Evaluate(
      evaluator.batch.Of(batch, 0, trainer->config().train.micro_batch, evaluator.ctx),
      evaluator.sums, evaluator.ctx, nullptr, &sink);
  return metrics;
}

std::string FirstNonFinite(Trainer* trainer, const TokenBatch& batch) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  int64_t count = 0, first = kNone;
  std::string found;
  ProbeSink sink;
  sink.sublayers = true;
  const Context& ctx = trainer->ctx();
  const Tensor sum = trainer->evaluator().sums.Slice(0, kSumSquares, 1);
  sink.on_tensor = [&](const std::string& name, Tensor t) {
    if (name.starts_with("logits")) return;  // chunks; the loss tells as much
    ++count;
    if (first != kNone || !t.contiguous()) return;
    const double before = DownloadDoubles(sum, ctx)[0];
    AddSumOfSquares(sum, t, ctx);
    if (std::isfinite(before) && !std::isfinite(DownloadDoubles(sum, ctx)[0])) {
      first = count;
      found = InWords(name, trainer->config().model);
    }
  };
  trainer->Gradients(batch, &sink);
  const Groups* const groups = trainer->groups();
  if (groups != nullptr) {
    const std::vector<int64_t> firsts = groups->world()->AllGather(first);
    const std::vector<std::string> names = groups->world()->AllGather(std::string_view(found));
    found =
        names[static_cast<size_t>(std::min_element(firsts.begin(), firsts.end()) - firsts.begin())];
  }
  return found.empty() ? "no sublayer's output or gradient, but the loss or a weight's gradient"
                       : found;
}

}  // namespace krait
