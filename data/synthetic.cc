#include "data/synthetic.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "kernels/base/random.h"

namespace krait {
namespace {

constexpr int32_t kFiller = 0, kSeparator = 1, kFirstData = 2;

// Random numbers of one sequence, one after another.
class Draws {
 public:
  Draws(uint64_t seed, uint64_t sequence) : stream_(seed, RandomPurpose::kSynthetic, sequence) {}
  // Uniform in [0, n).
  int64_t Below(int64_t n) {
    const auto share = stream_.Uniform(next_++) * static_cast<double>(n);
    return std::min(n - 1, static_cast<int64_t>(share));
  }

 private:
  RandomStream stream_;
  uint64_t next_ = 0;
};

// `count` of the numbers [0, n), distinct and ascending (Floyd's choice, kept sorted).
std::vector<int64_t> Choose(int64_t count, int64_t n, Draws* draws) {
  std::vector<int64_t> chosen;
  for (int64_t j = n - count; j < n; ++j) {
    const int64_t pick = draws->Below(j + 1);
    const auto at = std::lower_bound(chosen.begin(), chosen.end(), pick);
    if (at != chosen.end() && *at == pick) {
      chosen.push_back(j);  // above all others
    } else {
      chosen.insert(at, pick);
    }
  }
  return chosen;
}

void Shuffle(std::vector<int64_t>* values, Draws* draws) {
  for (size_t i = values->size(); i > 1; --i) {
    std::swap((*values)[i - 1],
              (*values)[static_cast<size_t>(draws->Below(static_cast<int64_t>(i)))]);
  }
}

}  // namespace

std::string SyntheticSpec::Name() const {
  const std::string name = kSyntheticTaskNames[static_cast<size_t>(task)];
  return items > 0 ? name + "-" + std::to_string(items) : name;
}

absl::Status CheckSynthetic(const SyntheticSpec& spec, int64_t seq_len, int64_t vocab_size) {
  const char* name = kSyntheticTaskNames[static_cast<size_t>(spec.task)];
  const auto fail = [&](const std::string& what) {
    return Error(ExitCode::kConfig, absl::StrFormat("synthetic task %s: %s", name, what));
  };
  const bool induction = spec.task == SyntheticTask::kInduction;
  if (induction && spec.items > 0) return fail("items has no effect; leave it out");
  if (!induction && spec.items < 1) {
    return fail(spec.task == SyntheticTask::kRecall
                    ? "items, the number of pairs, is missing"
                    : "items, the number of copied ids, is missing");
  }
  const int64_t data = vocab_size - kFirstData;
  const int64_t keys = data / 2;
  if (spec.task == SyntheticTask::kRecall && spec.items > keys) {
    return fail(
        absl::StrFormat("%d pairs need as many keys, and a vocab_size of %d has %d (half of "
                        "what is left beside filler and separator)",
                        spec.items, vocab_size, std::max<int64_t>(keys, 0)));
  }
  if (data < 2)
    return fail(absl::StrFormat("needs a vocab_size of at least 4, not %d", vocab_size));
  const int64_t need = induction                             ? 4
                       : spec.task == SyntheticTask::kRecall ? 2 * spec.items + 2
                                                             : 2 * spec.items + 1;
  if (seq_len < need) {
    return fail(absl::StrFormat("takes %d tokens%s, more than a sequence of data.seq_len %d", need,
                                induction ? "" : absl::StrFormat(" with items %d", spec.items),
                                seq_len));
  }
  return absl::OkStatus();
}

std::string SyntheticTokens::Hash() const {
  return absl::StrFormat(
      "%016x",
      HashName(absl::StrFormat("%s sequences %d seed %d seq_len %d vocab_size %d", spec_.Name(),
                               spec_.sequences, spec_.seed, seq_len_, vocab_size_)));
}

void SyntheticTokens::Sequence(int64_t k, std::vector<int32_t>* tokens,
                               std::vector<uint8_t>* counts) const {
  Draws draws(HashName(spec_.Name()) ^ spec_.seed, static_cast<uint64_t>(k));
  const int64_t n = spec_.items;
  tokens->clear();
  counts->assign(static_cast<size_t>(seq_len_), 0);
  const auto add = [&](int64_t id, bool count = false) {
    if (count) (*counts)[tokens->size()] = 1;
    tokens->push_back(static_cast<int32_t>(id));
  };
  const auto fill = [&](int64_t count) { tokens->insert(tokens->end(), count, kFiller); };
  const auto datum = [&] { return kFirstData + draws.Below(vocab_size_ - kFirstData); };

  if (spec_.task == SyntheticTask::kRecall) {
    const int64_t keys = (vocab_size_ - kFirstData) / 2;
    const int64_t first_value = kFirstData + keys, values = vocab_size_ - first_value;
    std::vector<int64_t> key = Choose(n, keys, &draws), value;
    Shuffle(&key, &draws);
    for (int64_t i = 0; i < n; ++i) {
      value.push_back(first_value + draws.Below(values));
      add(kFirstData + key[static_cast<size_t>(i)]);
      add(value.back());
    }
    for (int64_t left = seq_len_ - 2 * n; left >= 2; left -= 2) {
      const auto pair = static_cast<size_t>(draws.Below(n));
      add(kFirstData + key[pair]);
      add(value[pair], /*count=*/true);
    }
    fill(seq_len_ % 2);
  } else if (spec_.task == SyntheticTask::kInduction) {
    const int64_t place = draws.Below(seq_len_ - 3);
    for (int64_t t = 0; t < seq_len_ - 2; ++t) add(t == place ? kSeparator : datum());
    const int64_t answer = (*tokens)[static_cast<size_t>(place + 1)];
    add(kSeparator);
    add(answer, /*count=*/true);
  } else {
    const int64_t stretch = seq_len_ - 1 - n;
    std::vector<int64_t> places;
    if (spec_.task == SyntheticTask::kSelectiveCopy) {
      places = Choose(n, stretch, &draws);
    } else {
      for (int64_t i = 0; i < n; ++i) places.push_back(stretch - n + i);
    }
    fill(stretch);
    for (const int64_t place : places) {
      (*tokens)[static_cast<size_t>(place)] = static_cast<int32_t>(datum());
    }
    add(kSeparator);
    for (const int64_t place : places) add((*tokens)[static_cast<size_t>(place)], /*count=*/true);
  }
}

void SyntheticTokens::Read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* counts) const {
  std::vector<int32_t> ids;
  std::vector<uint8_t> which;
  for (int64_t done = 0; done < count;) {
    const int64_t k = (begin + done) / seq_len_, first = (begin + done) % seq_len_;
    const int64_t now = std::min(seq_len_ - first, count - done);
    Sequence(k, &ids, &which);
    if (tokens != nullptr) std::copy_n(ids.begin() + first, now, tokens + done);
    if (counts != nullptr) std::copy_n(which.begin() + first, now, counts + done);
    done += now;
  }
}

}  // namespace krait
