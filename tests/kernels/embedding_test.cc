#include "kernels/embedding.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

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
using testing::TestContext;
using testing::Values;
using testing::WithThreads;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kI32 = DType::kI32;

TEST(Embedding, GradientsInDouble) {
  const TestContext ctx;
  const int64_t vocab = 6, d = 70;  // more than one piece of columns
  for (const int64_t m : {1, 9}) {
    Buf tokens(kI32, {m}), table(kF64, {vocab, d}), y(kF64, {m, d}, 2), cotangent(kF64, {m, d}, 1),
        grad(kF64, {vocab, d});
    tokens.FillIntegers(1, 0, vocab);
    table.FillNormal(2);
    cotangent.FillNormal(3);
    EmbeddingBackward(grad, cotangent, tokens, ctx);
    CheckGradients(
        [&] {
          EmbeddingForward(y, tokens, table, ctx);
          return Dot(y, cotangent);
        },
        {{"table", table, grad}});
    EXPECT_TRUE(y.PaddingIntact());
    // Accumulates.
    const std::vector<double> once = Values(grad);
    EmbeddingBackward(grad, cotangent, tokens, ctx);
    for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(Values(grad)[i], 2 * once[i], 1e-14);
  }
}

TEST(Embedding, BackwardIsTheSameForAnyNumberOfThreads) {
  const TestContext ctx;
  const int64_t vocab = 5, d = 320, m = 700;
  Buf tokens(kI32, {m}), dy(kF32, {m, d}), one(kF32, {vocab, d}), two(kF32, {vocab, d});
  tokens.FillIntegers(1, 0, vocab);
  dy.FillNormal(2);
  WithThreads(1, [&] { EmbeddingBackward(one, dy, tokens, ctx); });
  WithThreads(2, [&] { EmbeddingBackward(two, dy, tokens, ctx); });
  EXPECT_TRUE(SameBits(one, two));
}

TEST(Embedding, NoTokens) {
  const TestContext ctx;
  Buf tokens(kI32, {0}), table(kF32, {3, 4}), y(kF32, {0, 4});
  EmbeddingForward(y, tokens, table, ctx);
  EmbeddingBackward(table, y, tokens, ctx);
  EXPECT_EQ(Values(table), std::vector<double>(12, 0));
}

// A table of more than 2^32 bytes and 2^31 elements, of which only the last row is touched.
TEST(Embedding, OffsetsBeyond32Bits) {
  const TestContext ctx;
  const int64_t d = 64, vocab = (int64_t{1} << 25) + 3;
  const size_t bytes = static_cast<size_t>(vocab * d) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const Tensor table(memory, kF32, Device::kCpu, {vocab, d});
  Buf tokens(kI32, {2}), dy(kF32, {2, d}), y(kF32, {2, d});
  tokens.Assign({static_cast<double>(vocab - 1), 0});
  dy.FillNormal(1);
  EmbeddingBackward(table, dy, tokens, ctx);
  EXPECT_EQ(static_cast<float*>(memory)[(vocab - 1) * d + 5], static_cast<float>(Get(dy, 5)));
  EmbeddingForward(y, tokens, table, ctx);
  EXPECT_EQ(Values(y), Values(dy));
  EXPECT_EQ(munmap(memory, bytes), 0);
}

TEST(EmbeddingDeathTest, TokensOutsideTheTableAreFatal) {
  const TestContext ctx;
  Buf tokens(kI32, {1}), table(kF32, {3, 4}), y(kF32, {1, 4});
  tokens.Fill(3);
  EXPECT_DEATH(EmbeddingForward(y, tokens, table, ctx), "check failed");
  tokens.Fill(-1);
  EXPECT_DEATH(EmbeddingForward(y, tokens, table, ctx), "check failed");
}

}  // namespace
}  // namespace krait
