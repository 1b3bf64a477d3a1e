// Which source each training position reads: a low-discrepancy schedule with O(1) access.
//
// The weights, divided by their sum, become shares p_i / L of a period of L positions: the smallest
// L up to 65536 that makes all of them whole (within 1e-9; weights of a few decimals are exact),
// else L = 65536 and p_i rounded by largest remainder. Inside a period the j-th use of source i has
// the window [floor(j L / p_i), ceil((j+1) L / p_i)), and the positions take the open windows by
// earliest end. As the windows ask for exactly one use per position, each is met (the "Pfair"
// schedule of Baruah et al. 1996), so that for every prefix of q positions the uses of source i
// differ from q p_i / L by less than 1, and by 0 at the end of each period.
#ifndef KRAIT_DATA_MIX_H_
#define KRAIT_DATA_MIX_H_

#include <cstdint>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

class Mix {
 public:
  Mix() = default;
  // kData when a weight is not a number above 0, or is below 1/65536 of the sum.
  static absl::StatusOr<Mix> Create(const std::vector<double>& weights);

  struct Use {
    int source;
    int64_t n;  // how often the source was used before
  };
  Use At(int64_t position) const;  // position >= 0
  // How often each source is used before `position`.
  std::vector<int64_t> Uses(int64_t position) const;

  int64_t period() const { return static_cast<int64_t>(schedule_.size()); }
  const std::vector<int64_t>& shares() const { return shares_; }  // p_i

 private:
  struct Slot {
    int32_t source;
    int32_t n;  // uses before it in the period
  };
  std::vector<int64_t> shares_;
  std::vector<Slot> schedule_;
};

}  // namespace krait

#endif  // KRAIT_DATA_MIX_H_
