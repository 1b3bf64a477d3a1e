#include "kernels/embedding.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CheckGradients;
using testing::Dot;
using testing::Get;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;
using testing::WithThreads;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kI32 = DType::kI32;

TEST(Embedding, GradientsInDouble) {
  const TestContext ctx;
  const int64_t vocab = 6, d = 70;  // more than one piece of columns
  const VocabularySlice whole = WholeVocabulary(vocab);
  for (const int64_t m : {1, 9}) {
    Buf tokens(kI32, {m}), table(kF64, {vocab, d}), y(kF64, {m, d}, 2), cotangent(kF64, {m, d}, 1),
        grad(kF64, {vocab, d});
    tokens.FillIntegers(1, 0, vocab);
    table.FillNormal(2);
    cotangent.FillNormal(3);
    EmbeddingBackward(grad, cotangent, tokens, whole, kNoPadToken, ctx);
    CheckGradients(
        [&] {
          EmbeddingForward(y, tokens, table, whole, ctx);
          return Dot(y, cotangent);
        },
        {{"table", table, grad}});
    EXPECT_TRUE(y.PaddingIntact());
    // Accumulates.
    const std::vector<double> once = Values(grad);
    EmbeddingBackward(grad, cotangent, tokens, whole, kNoPadToken, ctx);
    for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(Values(grad)[i], 2 * once[i], 1e-14);
  }
}

TEST(Embedding, BackwardIsTheSameForAnyNumberOfThreads) {
  const TestContext ctx;
  const int64_t vocab = 5, d = 320, m = 700;
  const VocabularySlice whole = WholeVocabulary(vocab);
  Buf tokens(kI32, {m}), dy(kF32, {m, d}), one(kF32, {vocab, d}), two(kF32, {vocab, d});
  tokens.FillIntegers(1, 0, vocab);
  dy.FillNormal(2);
  WithThreads(1, [&] { EmbeddingBackward(one, dy, tokens, whole, kNoPadToken, ctx); });
  WithThreads(2, [&] { EmbeddingBackward(two, dy, tokens, whole, kNoPadToken, ctx); });
  EXPECT_TRUE(SameBits(one, two));
}

TEST(Embedding, NoTokens) {
  const TestContext ctx;
  const VocabularySlice whole = WholeVocabulary(3);
  Buf tokens(kI32, {0}), table(kF32, {3, 4}), y(kF32, {0, 4});
  EmbeddingForward(y, tokens, table, whole, ctx);
  EmbeddingBackward(table, y, tokens, whole, kNoPadToken, ctx);
  EXPECT_EQ(Values(table), std::vector<double>(12, 0));
}

TEST(Embedding, ThePaddingRowGetsNoGradient) {
  const TestContext ctx;
  const int64_t vocab = 7, d = 70, m = 40;
  for (const int64_t pad : {0, 3, 6}) {
    // Of the whole vocabulary, and of a slice that begins at id 2.
    for (const VocabularySlice slice : {WholeVocabulary(vocab), VocabularySlice{2, 5, vocab}}) {
      Buf tokens(kI32, {m}), dy(kF32, {m, d}), all(kF32, {slice.used, d}),
          padded(kF32, {slice.used, d});
      tokens.FillIntegers(1, 0, vocab);
      dy.FillNormal(2);
      all.Fill(0.5);
      padded.Fill(0.5);
      EmbeddingBackward(all, dy, tokens, slice, kNoPadToken, ctx);
      EmbeddingBackward(padded, dy, tokens, slice, pad, ctx);
      for (int64_t i = 0; i < slice.used * d; ++i) {
        const bool own = slice.first + i / d == pad;
        EXPECT_EQ(Get(padded, i), own ? 0.5 : Get(all, i)) << pad << " " << i;
        EXPECT_NE(Get(all, i), 0.5);
      }
    }
  }
}

// A table of more than 2^32 bytes and 2^31 elements, of which only the last row is touched.
TEST(Embedding, OffsetsBeyond32Bits) {
  const TestContext ctx;
  const int64_t d = 64, vocab = (int64_t{1} << 25) + 3;
  const VocabularySlice whole = WholeVocabulary(vocab);
  const size_t bytes = static_cast<size_t>(vocab * d) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const Tensor table(memory, kF32, Device::kCpu, {vocab, d});
  Buf tokens(kI32, {2}), dy(kF32, {2, d}), y(kF32, {2, d});
  tokens.Assign({static_cast<double>(vocab - 1), 0});
  dy.FillNormal(1);
  EmbeddingBackward(table, dy, tokens, whole, kNoPadToken, ctx);
  EXPECT_EQ(static_cast<float*>(memory)[(vocab - 1) * d + 5], static_cast<float>(Get(dy, 5)));
  EmbeddingForward(y, tokens, table, whole, ctx);
  EXPECT_EQ(Values(y), Values(dy));
  EXPECT_EQ(munmap(memory, bytes), 0);
}

// Each slice writes zero rows for foreign tokens, so that the sum over slices is the embedding; its
// gradient ignores them. Rows beyond a slice's are padding.
TEST(Embedding, SlicesAddUpToTheWhole) {
  const TestContext ctx;
  const int64_t vocab = 11, d = 7, m = 30;
  for (const DType dtype : {kF32, kF64, DType::kBF16}) {
    const DType wide = Wide(dtype);
    Buf tokens(kI32, {m}), table(dtype, {vocab, d}), y(dtype, {m, d}), dy(dtype, {m, d}),
        dtable(wide, {vocab, d});
    tokens.FillIntegers(1, 0, vocab);
    table.FillNormal(2);
    dy.FillNormal(3);
    EmbeddingForward(y, tokens, table, WholeVocabulary(vocab), ctx);
    EmbeddingBackward(dtable, dy, tokens, WholeVocabulary(vocab), kNoPadToken, ctx);
    for (const std::vector<int64_t>& sizes :
         std::vector<std::vector<int64_t>>{{6, 5}, {5, 6, 0}, {1, 9, 1}}) {
      std::vector<double> sum(static_cast<size_t>(m * d));
      int64_t first = 0;
      for (const int64_t used : sizes) {
        const VocabularySlice slice{first, used, vocab};
        Buf part(dtype, {used + 2, d}, 1), own(dtype, {m, d}, 2), gradient(wide, {used + 2, d}, 1);
        part.Fill(std::nan(""));
        own.Fill(std::nan(""));
        gradient.Fill(0.5);
        for (int64_t i = 0; i < used * d; ++i) Set(part, i, Get(table, first * d + i));
        EmbeddingForward(own, tokens, part, slice, ctx);
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += Values(own)[i];
        EmbeddingBackward(gradient, dy, tokens, slice, kNoPadToken, ctx);
        for (int64_t i = 0; i < (used + 2) * d; ++i) {
          const double want = i < used * d ? Get(dtable, first * d + i) : 0;
          // At most a dozen additions, begun at another number.
          EXPECT_NEAR(Get(gradient, i), 0.5 + want, 12 * 0x1p-24 * 10);
        }
        EXPECT_TRUE(own.PaddingIntact() && gradient.PaddingIntact());
        first += used;
      }
      EXPECT_EQ(sum, Values(y));
    }
  }
}

TEST(EmbeddingDeathTest, TokensOutsideTheVocabularyAreFatal) {
  const TestContext ctx;
  const VocabularySlice whole = WholeVocabulary(3);
  Buf tokens(kI32, {1}), table(kF32, {3, 4}), y(kF32, {1, 4});
  tokens.Fill(3);
  EXPECT_DEATH(EmbeddingForward(y, tokens, table, whole, ctx), "check failed");
  tokens.Fill(-1);
  EXPECT_DEATH(EmbeddingForward(y, tokens, table, whole, ctx), "check failed");
}

}  // namespace
}  // namespace krait
