#include "model/expert_routes.h"

#include <algorithm>

#include "kernels/base/check.h"

namespace krait {

ExpertRoutes::ExpertRoutes(const std::vector<int64_t>& offsets, int ranks, int rank,
                           int64_t capacity)
    : offsets_(offsets),
      ranks_(ranks),
      rank_(rank),
      experts_(static_cast<int64_t>(offsets.size()) / ranks - 1),
      capacity_(capacity) {
  KRAIT_CHECK(capacity > 0 && experts_ % ranks == 0);
  const int64_t own = experts_ / ranks;
  for (int holder = 0; holder < ranks; ++holder) {
    int64_t rows = 0;
    for (int sender = 0; sender < ranks; ++sender) {
      rows += Offset(sender, (holder + 1) * own) - Offset(sender, holder * own);
    }
    rounds_ = std::max(rounds_, (rows + capacity - 1) / capacity);
  }
}

int64_t ExpertRoutes::Offset(int rank, int64_t expert) const {
  return offsets_[static_cast<size_t>(rank * (experts_ + 1) + expert)];
}

ExpertRoutes::Part ExpertRoutes::InRound(int64_t begin, int64_t rows, int64_t k) const {
  const int64_t first = std::max(begin, k * capacity_);
  const int64_t last = std::min(begin + rows, (k + 1) * capacity_);
  return {first - begin, std::max<int64_t>(0, last - first)};
}

ExpertRoutes::Round ExpertRoutes::round(int64_t k) const {
  Round round;
  const int64_t own = experts_ / ranks_;
  for (int holder = 0; holder < ranks_; ++holder) {
    int64_t at = 0;  // row of the holder
    for (int64_t e = holder * own; e < (holder + 1) * own; ++e) {
      if (holder == rank_) {
        round.offsets.push_back(std::clamp<int64_t>(at - k * capacity_, 0, capacity_));
      }
      for (int sender = 0; sender < ranks_; ++sender) {
        const int64_t rows = Rows(sender, e);
        const Part part = InRound(at, rows, k);
        const int64_t from = Offset(sender, e) + part.begin, to = at + part.begin - k * capacity_;
        if (part.rows > 0 && sender == rank_) {
          round.sends.push_back({holder, from, part.rows, to});
        }
        if (part.rows > 0 && holder == rank_) {
          round.receives.push_back({sender, to, part.rows, from});
        }
        at += rows;
      }
    }
    if (holder == rank_) {
      round.offsets.push_back(std::clamp<int64_t>(at - k * capacity_, 0, capacity_));
    }
  }
  return round;
}

}  // namespace krait
