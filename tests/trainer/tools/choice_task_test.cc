// Multiple choice: bad task files, and scores against the loss of the same tokens.
#include "trainer/tools/choice_task.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "support/tiny_run.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(ChoiceTask, BadLinesAreNamedAllAtOnce) {
  const TempFolder folder;
  const std::string path =
      folder.Write("t.jsonl",
                   "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], "
                   "\"answer\": 1}\n\nnot json\n"
                   "{\"context\": \"\", \"choices\": [\"b\", \"c\"], "
                   "\"answer\": 0}\n"
                   "{\"context\": \"a\", \"choices\": [\"b\"], \"answer\": 0}\n"
                   "{\"context\": \"a\", \"choices\": [\"b\", \"\"], "
                   "\"answer\": 0}\n"
                   "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], "
                   "\"answer\": 2}\n");
  const auto items = ReadChoiceTask(path);
  EXPECT_EQ(ExitCodeOf(items.status()), ExitCode::kData);
  EXPECT_THAT(MessageOf(items.status()),
              AllOf(HasSubstr("t.jsonl:3: no JSON object"), HasSubstr("t.jsonl:4: \"context\""),
                    HasSubstr("t.jsonl:5: \"choices\""), HasSubstr("t.jsonl:6: \"choices\""),
                    HasSubstr("t.jsonl:7: \"answer\" is no index from 0 to 1")));
  EXPECT_THAT(MessageOf(ReadChoiceTask(folder.Write("e.jsonl", "\n")).status()),
              HasSubstr("no item in it"));
}

// A model of bytes that has learnt text of a few words finds them likelier than noise; and the loss
// of an answer is that of its bytes in a text evaluated as a whole.
TEST(ChoiceTask, AnswersAreScoredByTheirTokens) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=60"}).code, 0);
  std::string lines;
  for (int i = 0; i < 8; ++i) {
    lines += i % 2 == 0 ? "{\"context\": \"krait scan state \", \"choices\": [\"expert\", "
                          "\"qzxjvw\"], \"answer\": 0}\n"
                        : "{\"context\": \"norm of gate\", \"choices\": [\"#%&\", \" krait\", "
                          "\"~~~~~~~~~\"], \"answer\": 1}\n";
  }
  const std::string task = tiny.folder().Write("task.jsonl", lines);
  const ProcessResult result = TinyRun::Krait({"eval", tiny / "run", "--task", task, "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json["items"], 8);
  EXPECT_EQ(json["accuracy"], 1.0);
  EXPECT_EQ(json["accuracy_by_byte"], 1.0);
  EXPECT_NEAR(json["chance"].get<double>(), (4 * 0.5 + 4.0 / 3) / 8, 1e-12);
  EXPECT_LT(json["loss"].get<double>(), std::log(256.0));
  EXPECT_THAT(TinyRun::Krait({"eval", tiny / "run", "--task", task}).out,
              HasSubstr("accuracy       1.0000"));
  EXPECT_EQ(TinyRun::Krait({"eval", tiny / "run", "--task", task, "--by", "context"}).code, 20);
  // Ranks take items in turn; more ranks than items do no harm, and errors are said once.
  for (const char* ranks : {"2", "9"}) {
    std::vector<std::string> words = {KRAIT_MPIRUN, "-n", ranks, KRAIT_BINARY};
    for (const std::string& word :
         {std::string("eval"), tiny / "run", std::string("--task"), task}) {
      words.push_back(word);
    }
    words.emplace_back("--json");
    const ProcessResult several = RunProcess(words, MpiVariables());
    EXPECT_EQ(several.code, 0) << several.err;
    EXPECT_EQ(several.out, result.out);
    words[7] = tiny / "none.jsonl";
    const ProcessResult missing = RunProcess(words, MpiVariables());
    EXPECT_EQ(missing.code, 21) << missing.err;
    EXPECT_EQ(missing.err.find("none.jsonl"), missing.err.rfind("none.jsonl")) << missing.err;
  }
  EXPECT_EQ(TinyRun::Krait({"eval", tiny / "run", "--task", tiny / "none.jsonl"}).code, 21);

  // The same bytes as a choice after one byte, and as a loss by context.
  const auto model = InferenceModel::Load(tiny / "run", [](const std::string&) {});
  ASSERT_TRUE(model.ok()) << model.status();
  const auto tokenizer = TokenizerOf((*model)->checkpoint(), "");
  ASSERT_TRUE(tokenizer.ok());
  const std::string text = "krait scan";
  const auto scored = ScoreChoices({{text.substr(0, 1), {text.substr(1), "x"}, 0}},
                                   tokenizer->tokenizer.get(), model->get());
  ASSERT_TRUE(scored.ok()) << scored.status();
  EXPECT_TRUE(std::isfinite(scored->loss));
  // -log p(9 bytes) = -log p(4 bytes) - log p(5 bytes after them).
  const auto part = ScoreChoices({{text.substr(0, 1), {text.substr(1, 4), "x"}, 0}},
                                 tokenizer->tokenizer.get(), model->get());
  const auto rest = ScoreChoices({{text.substr(0, 5), {text.substr(5), "x"}, 0}},
                                 tokenizer->tokenizer.get(), model->get());
  ASSERT_TRUE(part.ok() && rest.ok());
  // fp32 sums of 9 losses of a few nats.
  EXPECT_NEAR(9 * scored->loss, 4 * part->loss + 5 * rest->loss, 1e-4);
}

}  // namespace
}  // namespace krait
