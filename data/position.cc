#include "data/position.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/check.h"
#include "kernels/base/number.h"

namespace krait {
namespace {

constexpr char kWeightWord[] = " weight ";
constexpr char kContentWord[] = " content ";

std::string EpochOf(const SourcePosition& source, int64_t tokens) {
  return PrintEpoch(source.epoch, source.place, tokens / source.seq_len);
}

// For each of today's files the source of `saved` with its content, or -1. Of several with one
// content each is taken once, those of equal weight first.
std::vector<int> Match(const DataPosition& saved, const std::vector<SourceFile>& files) {
  std::vector<int> known(files.size(), -1);
  std::vector<bool> taken(saved.sources.size(), false);
  for (const bool equal_weight : {true, false}) {
    for (size_t f = 0; f < files.size(); ++f) {
      for (size_t s = 0; s < saved.sources.size() && known[f] < 0; ++s) {
        if (taken[s] || saved.sources[s].content != files[f].content) continue;
        if (equal_weight && saved.sources[s].weight != files[f].weight) continue;
        known[f] = static_cast<int>(s);
        taken[s] = true;
      }
    }
  }
  return known;
}

// `source` with its place within an epoch of its file's sequences.
SourcePosition Reduced(SourcePosition source, int64_t tokens) {
  const int64_t count = tokens / source.seq_len;
  if (count > 0 && source.place >= count) {
    source.epoch += source.place / count;
    source.place %= count;
    source.shuffles = {{0, source.shuffles.back().seed}};
  }
  return source;
}

void CutAnew(int64_t seq_len, SourcePosition* source) {
  if (source->place > 0) ++source->epoch;
  source->place = 0;
  source->seq_len = seq_len;
  source->shuffles = {{0, source->shuffles.back().seed}};
}

void ShuffleRest(uint64_t seed, SourcePosition* source) {
  if (source->shuffles.back().seed == seed) return;
  if (source->shuffles.back().from == source->place) source->shuffles.pop_back();
  source->shuffles.push_back({source->place, seed});
}

}  // namespace

std::string PrintEpoch(int64_t epoch, int64_t place, int64_t count) {
  const __int128 hundredths = static_cast<__int128>(place) * 100 / std::max<int64_t>(count, 1);
  return absl::StrFormat("%d.%02d", epoch, static_cast<int64_t>(hundredths));
}

absl::StatusOr<DataPosition> PositionOfFirstVersion(const std::string& fingerprint,
                                                    int64_t sequences, int64_t seq_len,
                                                    uint64_t seed) {
  DataPosition position;
  position.sequences = sequences;
  std::vector<double> weights;
  std::istringstream lines(fingerprint);
  for (std::string line; std::getline(lines, line);) {
    const size_t content = line.rfind(kContentWord);
    const size_t weight = line.rfind(kWeightWord, content);
    if (content == std::string::npos || weight == std::string::npos) break;
    const size_t number = weight + sizeof(kWeightWord) - 1;
    SourcePosition source;
    source.path = line.substr(0, weight);
    source.content = line.substr(content + sizeof(kContentWord) - 1);
    source.weight = ParseNumber(line.substr(number, content - number)).value_or(0);
    source.key = static_cast<int64_t>(position.sources.size());
    source.seq_len = seq_len;
    source.shuffles = {{0, seed}};
    weights.push_back(source.weight);
    position.sources.push_back(std::move(source));
  }
  const auto mix =
      weights.empty() ? Error(ExitCode::kData, "it names no source") : Mix::Create(weights);
  if (!mix.ok()) {
    return Error(ExitCode::kNoCheckpoint,
                 "data_fingerprint of the checkpoint cannot be read: " + MessageOf(mix.status()));
  }
  const std::vector<int64_t> uses = mix->Uses(sequences);
  for (size_t i = 0; i < uses.size(); ++i) position.sources[i].place = uses[i];
  return position;
}

absl::StatusOr<Continuation> ContinueFrom(const DataPosition& saved,
                                          const std::vector<SourceFile>& files, int64_t seq_len,
                                          uint64_t seed) {
  Continuation next;
  next.position.sequences = saved.sequences;
  const std::vector<int> known = Match(saved, files);
  int64_t free_key = 0;
  for (const SourcePosition& source : saved.sources) {
    free_key = std::max(free_key, source.key + 1);
  }
  std::vector<std::string> cut, shuffled;
  std::vector<double> weights;
  bool same_sources = true;
  const auto add = [&](size_t f, SourcePosition source) {
    source.path = files[f].path;
    source.weight = files[f].weight;
    weights.push_back(source.weight);
    next.files.push_back(static_cast<int>(f));
    next.position.sources.push_back(std::move(source));
  };
  // The known ones, in the order of the mix in which they are known.
  for (size_t s = 0; s < saved.sources.size(); ++s) {
    const auto found = std::find(known.begin(), known.end(), static_cast<int>(s));
    if (found == known.end()) continue;
    const auto f = static_cast<size_t>(found - known.begin());
    SourcePosition source = Reduced(saved.sources[s], files[f].tokens);
    if (source.weight == 0) {
      same_sources = false;
      next.lines.push_back(absl::StrFormat("%s comes back, at epoch %s", files[f].path,
                                           EpochOf(source, files[f].tokens)));
    }
    if (source.seq_len != seq_len) {
      const int64_t before = source.place;
      if (before > 0) {
        cut.push_back(
            absl::StrFormat("%s was at epoch %s", files[f].path, EpochOf(source, files[f].tokens)));
      }
      CutAnew(seq_len, &source);
      if (before > 0) cut.back() += absl::StrFormat(" and begins epoch %d", source.epoch);
    }
    if (source.shuffles.back().seed != seed && source.place > 0) {
      shuffled.push_back(
          absl::StrFormat("%s at epoch %s", files[f].path, EpochOf(source, files[f].tokens)));
    }
    ShuffleRest(seed, &source);
    add(f, std::move(source));
  }
  // Then those that the run did not know.
  for (size_t f = 0; f < files.size(); ++f) {
    const auto before = std::find_if(
        saved.sources.begin(), saved.sources.end(),
        [&](const SourcePosition& s) { return s.path == files[f].path && s.weight > 0; });
    const bool replaced =
        before != saved.sources.end() && before->content != files[f].content &&
        std::none_of(saved.sources.begin(), saved.sources.end(), [&](const SourcePosition& s) {
          return s.path == files[f].path && s.content == files[f].content && s.weight > 0;
        });
    if (replaced) {
      next.lines.push_back(absl::StrFormat(
          "%s holds other tokens than in the checkpoint (content %s, not %s): %s", files[f].path,
          files[f].content, before->content,
          known[f] < 0 ? "it is read from its beginning" : "it goes on where these tokens stood"));
    }
    if (known[f] >= 0) continue;
    same_sources = false;
    if (!replaced) {
      next.lines.push_back(files[f].path + " is new to this run: it is read from its beginning");
    }
    SourcePosition source;
    source.content = files[f].content;
    source.key = free_key++;
    source.seq_len = seq_len;
    source.shuffles = {{0, seed}};
    add(f, std::move(source));
  }
  std::vector<double> saved_weights;
  for (size_t s = 0; s < saved.sources.size(); ++s) {
    SourcePosition source = saved.sources[s];
    if (source.weight > 0) saved_weights.push_back(source.weight);
    if (std::find(known.begin(), known.end(), static_cast<int>(s)) != known.end()) continue;
    if (source.weight > 0) {
      same_sources = false;
      next.lines.push_back(
          absl::StrFormat("%s (content %s) is left out from here on; should it come back it goes "
                          "on where it stands",
                          source.path, source.content));
    }
    source.weight = 0;
    next.position.sources.push_back(std::move(source));
  }
  if (!cut.empty()) {
    next.lines.push_back(absl::StrFormat(
        "data.seq_len is %d now: the sequences are cut anew and come in a new order, each once in "
        "an epoch; %s",
        seq_len, absl::StrJoin(cut, ", ")));
  }
  if (!shuffled.empty()) {
    next.lines.push_back(
        absl::StrFormat("train.seed is %d now: what is left of each epoch comes in a new order, "
                        "nothing twice; %s",
                        seed, absl::StrJoin(shuffled, ", ")));
  }
  KRAIT_ASSIGN_OR_RETURN(next.mix, Mix::Create(weights));
  if (same_sources) {
    const auto before = Mix::Create(saved_weights);
    next.same_data = before.ok() && before->shares() == next.mix.shares();
  }
  next.position.mix_start = next.same_data ? saved.mix_start : saved.sequences;
  return next;
}

}  // namespace krait
