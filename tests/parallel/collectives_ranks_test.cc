#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/groups.h"
#include "support/gradcheck.h"
#include "support/ranks.h"

namespace krait::testing {
namespace {

class CollectivesTest : public ::testing::Test {
 protected:
  CollectivesTest() : world_(TestWorld()), scratch_("scratch", Device::kCpu, 1 << 20) {
    ctx_.scratch = &scratch_;
    std::vector<int> all(static_cast<size_t>(world_->size()));
    std::iota(all.begin(), all.end(), 0);
    all_.emplace(Communicator::Links{.world = world_, .nccl = nullptr}, all, world_->rank());
  }
  int rank() const { return world_->rank(); }
  int size() const { return world_->size(); }
  // A value that every rank can compute of every other.
  static double Value(int rank, int64_t i) {
    return std::sin(1 + 7 * rank + static_cast<double>(i));
  }

  World* world_;
  Arena scratch_;
  Context ctx_;
  std::optional<Communicator> all_;
};

TEST_F(CollectivesTest, TextsOfAnyLengthArriveInRankOrder) {
  const std::vector<std::string> all = world_->AllGather(
      std::string(static_cast<size_t>(rank() * 3), static_cast<char>('a' + rank())));
  ASSERT_EQ(all.size(), static_cast<size_t>(size()));
  for (int r = 0; r < size(); ++r) {
    EXPECT_EQ(all[static_cast<size_t>(r)],
              std::string(static_cast<size_t>(r * 3), static_cast<char>('a' + r)));
  }
  EXPECT_EQ(world_->Broadcast("of rank " + std::to_string(rank())), "of rank 0");
}

TEST_F(CollectivesTest, SumsAreThoseOfTheRanksInOrder) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    const int64_t n = 5;
    Buf x(dtype, {n}), in(dtype, {size(), n}), out(dtype, {1, n});
    for (int64_t i = 0; i < n; ++i) Set(x, i, Value(rank(), i));
    for (int64_t i = 0; i < size() * n; ++i) Set(in, i, Value(rank(), i));
    Buf expected(dtype, {n}), scattered(dtype, {n});
    Buf sum(Wide(dtype), {n}), scattered_sum(Wide(dtype), {n}), rounded(dtype, {n});
    for (int r = 0; r < size(); ++r) {
      for (int64_t i = 0; i < n; ++i) {
        Set(rounded, i, Value(r, i));
        Set(sum, i, Get(sum, i) + Get(rounded, i));
        Set(rounded, i, Value(r, rank() * n + i));
        Set(scattered_sum, i, Get(scattered_sum, i) + Get(rounded, i));
      }
    }
    all_->AllReduceSum("x", x, ctx_);
    all_->ReduceScatterSum("in", out, in, ctx_);
    for (int64_t i = 0; i < n; ++i) {
      Set(expected, i, Get(sum, i));
      Set(scattered, i, Get(scattered_sum, i));
      EXPECT_EQ(Get(x, i), Get(expected, i)) << Name(dtype);
      EXPECT_EQ(Get(out, i), Get(scattered, i)) << Name(dtype);
    }
  }
  Buf counts(DType::kI64, {2});
  Set(counts, 0, rank());
  Set(counts, 1, 1);
  all_->AllReduceSum("counts", counts, ctx_);
  EXPECT_EQ(Get(counts, 0), size() * (size() - 1) / 2);
  EXPECT_EQ(Get(counts, 1), size());
}

TEST_F(CollectivesTest, TheMaximumKeepsNaN) {
  Buf x(DType::kF32, {3});
  Set(x, 0, -rank());
  Set(x, 1, rank());
  Set(x, 2, rank() == size() - 1 ? std::nan("") : 100.0);
  all_->AllReduceMax("x", x, ctx_);
  EXPECT_EQ(Get(x, 0), 0);
  EXPECT_EQ(Get(x, 1), size() - 1);
  EXPECT_TRUE(std::isnan(Get(x, 2)));
}

TEST_F(CollectivesTest, RowsGoWhereTheyAreSent) {
  const auto [sends, receives, sent, received] = UnevenRows();
  Buf in(DType::kF32, {sent + 1, 2}), out(DType::kF32, {received + 1, 2});
  for (const RowMessage& send : sends) {
    for (int64_t i = 0; i < send.rows * 2; ++i) {
      Set(in, send.row * 2 + i, Value(rank(), 100 * send.rank + i));
    }
  }
  all_->ExchangeRows("rows", out, receives, in, sends, ctx_);
  for (const RowMessage& receive : receives) {
    for (int64_t i = 0; i < receive.rows * 2; ++i) {
      EXPECT_EQ(Get(out, receive.row * 2 + i),
                static_cast<float>(Value(receive.rank, 100 * rank() + i)));
    }
  }
}

TEST_F(CollectivesTest, SetsOfRanksWorkSideBySide) {
  if (size() % 2 != 0) return;
  const Groups groups(world_, {.data = size() / 2, .tensor = 2, .rank = rank()});
  Buf x(DType::kF64, {1});
  Set(x, 0, rank());
  groups.tensor().AllReduceSum("x", x, ctx_);
  EXPECT_EQ(Get(x, 0), 2 * (rank() / 2 * 2) + 1);
  Set(x, 0, rank());
  groups.Of(groups.mesh().TensorReplicas(1)).AllReduceSum("x", x, ctx_);
  EXPECT_EQ(Get(x, 0), size() / 2 * (rank() % 2) + size() / 2 * (size() / 2 - 1));
}

TEST_F(CollectivesTest, AnErrorOfOneRankIsEveryRanks) {
  EXPECT_TRUE(Agree(world_, absl::OkStatus()).ok());
  const bool mine = rank() == size() - 1;
  const absl::Status one =
      Agree(world_, mine ? Error(ExitCode::kData, "x.h5: broken") : absl::OkStatus());
  EXPECT_EQ(ExitCodeOf(one), ExitCode::kData);
  const std::string who = size() > 1 ? "rank " + std::to_string(size() - 1) + ": " : "";
  EXPECT_EQ(MessageOf(one), world_->first() ? who + "x.h5: broken" : "");
  const absl::Status all = Agree(world_, Error(ExitCode::kConfig, "model.d_model: no"));
  EXPECT_EQ(ExitCodeOf(all), ExitCode::kConfig);
  EXPECT_EQ(MessageOf(all), world_->first() ? "model.d_model: no" : "");
}

}  // namespace
}  // namespace krait::testing
