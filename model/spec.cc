#include "model/spec.h"

#include <algorithm>
#include <numeric>
#include <sstream>

namespace krait {

const char* Name(SublayerKind kind) {
  switch (kind) {
    case SublayerKind::kAttention:
      return "attention";
    case SublayerKind::kMamba:
      return "mamba";
    case SublayerKind::kMlp:
      return "mlp";
    case SublayerKind::kMoe:
      return "moe";
  }
  return "?";
}

bool ModelSpec::Has(SublayerKind kind) const { return Count(kind) > 0; }

int64_t ModelSpec::Count(SublayerKind kind) const {
  return std::count_if(sublayers.begin(), sublayers.end(),
                       [kind](const Sublayer& s) { return s.kind == kind; });
}

absl::StatusOr<std::vector<bool>> AttentionLayers(int64_t a, int64_t m, int64_t offset,
                                                  int64_t n_layers) {
  if (a < 0 || m < 0 || a + m == 0) {
    return Error(ExitCode::kConfig, "a ratio is ATTENTION:MAMBA with at least one of them above 0");
  }
  const int64_t divisor = std::gcd(a, m);
  a /= divisor;
  m /= divisor;
  const int64_t p = a + m;
  if (offset < 0) offset = a == 0 ? 0 : p / (2 * a);
  if (a > 0 && m == 0) offset = 0;
  if (offset >= p) {
    return Error(ExitCode::kConfig, "offset " + std::to_string(offset) +
                                        " must be below the period " + std::to_string(p));
  }
  std::vector<bool> attention(static_cast<size_t>(n_layers));
  int64_t count = 0;
  for (int64_t i = 0; i < n_layers; ++i) {
    const int64_t phase = ((i - offset) % p + p) % p;
    attention[static_cast<size_t>(i)] = phase * a % p < a;
    count += attention[static_cast<size_t>(i)] ? 1 : 0;
  }
  if (a > 0 && m > 0 && (count == 0 || count == n_layers)) {
    return Error(ExitCode::kConfig, "ratio " + std::to_string(a) + ":" + std::to_string(m) +
                                        " with offset " + std::to_string(offset) + " yields no " +
                                        (count == 0 ? "attention" : "Mamba") + " layer in " +
                                        std::to_string(n_layers) + " layers");
  }
  return attention;
}

absl::StatusOr<std::vector<bool>> MoeLayers(int64_t every, int64_t offset, int64_t n_layers) {
  std::vector<bool> moe(static_cast<size_t>(n_layers));
  if (every == 0) return moe;
  if (offset < 0) offset = every - 1;
  if (every < 0 || offset >= every) {
    return Error(ExitCode::kConfig, "offset " + std::to_string(offset) + " must be below every " +
                                        std::to_string(every));
  }
  for (int64_t i = 0; i < n_layers; ++i) moe[static_cast<size_t>(i)] = i % every == offset;
  return moe;
}

absl::StatusOr<std::vector<LayerKinds>> ParsePattern(const std::string& pattern, int64_t n_layers) {
  std::vector<LayerKinds> period;
  std::istringstream words(pattern);
  for (std::string word; words >> word;) {
    const bool moe = word.size() == 2 && word[1] == 'E';
    if ((word[0] != 'm' && word[0] != 'a') || (word.size() != 1 && !moe)) {
      return Error(ExitCode::kConfig, "\"" + word + "\" is no layer: use m, a, mE or aE");
    }
    period.push_back({word[0] == 'a', moe});
  }
  if (period.empty()) return Error(ExitCode::kConfig, "the pattern has no layer");
  std::vector<LayerKinds> layers;
  for (int64_t i = 0; i < n_layers; ++i) {
    layers.push_back(period[static_cast<size_t>(i) % period.size()]);
  }
  return layers;
}

std::vector<Sublayer> MakeSublayers(const std::vector<LayerKinds>& layers) {
  std::vector<Sublayer> sublayers;
  for (size_t i = 0; i < layers.size(); ++i) {
    const int layer = static_cast<int>(i);
    sublayers.push_back(
        {layers[i].attention ? SublayerKind::kAttention : SublayerKind::kMamba, layer});
    sublayers.push_back({layers[i].moe ? SublayerKind::kMoe : SublayerKind::kMlp, layer});
  }
  return sublayers;
}

double FlopsPerToken(const ModelSpec& spec, int64_t seq_len) {
  const auto d = static_cast<double>(spec.d_model);
  double forward = 2 * d * static_cast<double>(spec.vocab_size);
  for (const Sublayer& sublayer : spec.sublayers) {
    switch (sublayer.kind) {
      case SublayerKind::kAttention: {
        const auto q = static_cast<double>(spec.attention.heads * spec.attention.head_dim);
        const auto kv = static_cast<double>(spec.attention.kv_heads * spec.attention.head_dim);
        forward += 4 * d * (q + kv) + 2 * static_cast<double>(seq_len) * q;
        break;
      }
      case SublayerKind::kMamba: {
        const auto i = static_cast<double>(spec.mamba.d_inner);
        forward += 6 * i * d + i * (11 * static_cast<double>(spec.mamba.d_state) +
                                    4 * static_cast<double>(spec.mamba.dt_rank) + 1);
        break;
      }
      case SublayerKind::kMlp:
        forward += 6 * d * static_cast<double>(spec.mlp_d_ff);
        break;
      case SublayerKind::kMoe:
        forward += 6 * d * static_cast<double>(spec.moe.d_ff * spec.moe.top_k);
        break;
    }
  }
  return 3 * forward;
}

}  // namespace krait
