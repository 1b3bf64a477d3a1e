// Where a run stands in its sources, and how it goes on when they have changed.
//
// A source is known by the content of its file. It has an epoch and a place in it of its own, so
// that weights, order, paths and the company of a source can change without anything being read
// twice or passed over.
#ifndef KRAIT_DATA_POSITION_H_
#define KRAIT_DATA_POSITION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "data/mix.h"
#include "kernels/base/status.h"

namespace krait {

// From place `from` on, what is left of an epoch comes in an order drawn by `seed`.
struct Shuffle {
  int64_t from = 0;
  uint64_t seed = 0;
  bool operator==(const Shuffle&) const = default;
};

struct SourcePosition {
  std::string content;            // hash of the token file
  std::string path;               // where it was last, for messages
  double weight = 0;              // in the mix; 0: left out of it
  int64_t key = 0;                // of its permutations; no two sources of a run share one
  int64_t seq_len = 0;            // that its sequences are counted in
  int64_t epoch = 0, place = 0;   // `place` sequences of this epoch were read
  std::vector<Shuffle> shuffles;  // of this epoch, the first from 0; later epochs: the last seed
  bool operator==(const SourcePosition&) const = default;
};

struct DataPosition {
  int64_t sequences = 0;  // training positions before it
  int64_t mix_start = 0;  // the training position at which the present mix began its first period
  std::vector<SourcePosition> sources;  // those of the mix in its order, then those left out
};

// "1.37": epochs, of which each has `count` sequences; rounded down.
std::string PrintEpoch(int64_t epoch, int64_t place, int64_t count);

// The position that a checkpoint of the first version stands for. It had the number of sequences
// alone, and the sources in the lines of Dataset::Fingerprint. Places are not reduced to epochs,
// for which the sizes of the files are needed. kNoCheckpoint when the lines cannot be read.
absl::StatusOr<DataPosition> PositionOfFirstVersion(const std::string& fingerprint,
                                                    int64_t sequences, int64_t seq_len,
                                                    uint64_t seed);

// A source of today.
struct SourceFile {
  std::string path, content;
  double weight = 1;
  int64_t tokens = 0;
};

struct Continuation {
  DataPosition position;
  std::vector<int> files;  // of today's, for each source of the mix
  Mix mix;
  bool same_data = false;          // the same contents at the same shares
  std::vector<std::string> lines;  // what differs and what comes of it, for the user
};

// Goes on from `saved` with today's `files`. Sources that the run knows go on where they stood, in
// the order of the mix in which it knew them; others begin at their beginning. Another seed
// shuffles what is left of each epoch anew. With another seq_len a source's sequences are cut anew:
// it begins a new epoch, unless it stands at the beginning of one. kData when the weights make no
// mix.
absl::StatusOr<Continuation> ContinueFrom(const DataPosition& saved,
                                          const std::vector<SourceFile>& files, int64_t seq_len,
                                          uint64_t seed);

}  // namespace krait

#endif  // KRAIT_DATA_POSITION_H_
