// Where the rows of one MoE sublayer and pass travel between the ranks of an expert group. Plain
// arithmetic: every rank knows what every rank of the group sends, so all agree on the rounds.
//
// A rank's rows are sorted by expert (kernels/moe.h). The rank that holds an expert takes its rows
// from all ranks of the group, in rank order: its rows are ordered by (expert, sender). It computes
// them in rounds of at most `capacity` rows; with routing that is not too uneven there is one
// round.
#ifndef KRAIT_MODEL_EXPERT_ROUTES_H_
#define KRAIT_MODEL_EXPERT_ROUTES_H_

#include <cstdint>
#include <vector>

#include "parallel/collectives.h"

namespace krait {

class ExpertRoutes {
 public:
  // offsets [ranks,E+1]: where each rank's rows of an expert begin. E is a multiple of `ranks`.
  ExpertRoutes(const std::vector<int64_t>& offsets, int ranks, int rank, int64_t capacity);

  // The same on all ranks of the group; at least 1.
  int64_t rounds() const { return rounds_; }

  struct Round {
    std::vector<RowMessage> sends;     // of this rank's sorted rows
    std::vector<RowMessage> receives;  // to rows of the round
    // Where the rows of each of this rank's experts begin in the round, [E/ranks+1].
    std::vector<int64_t> offsets;
  };
  Round round(int64_t k) const;

 private:
  // The part of a segment of `rows` rows from row `begin` of a receiver on that falls in round k,
  // relative to the segment.
  struct Part {
    int64_t begin = 0, rows = 0;
  };
  Part InRound(int64_t begin, int64_t rows, int64_t k) const;
  int64_t Offset(int rank, int64_t expert) const;
  int64_t Rows(int rank, int64_t expert) const {
    return Offset(rank, expert + 1) - Offset(rank, expert);
  }

  std::vector<int64_t> offsets_;
  int ranks_, rank_;
  int64_t experts_, capacity_, rounds_ = 1;
};

}  // namespace krait

#endif  // KRAIT_MODEL_EXPERT_ROUTES_H_
