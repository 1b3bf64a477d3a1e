// Damaged checkpoints: flipped bits, truncations, hostile manifests. All are noticed, named and
// passed over.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/crc32c.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_boxes.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"
#include "trainer/checkpoint/checkpoint_tools.h"

namespace krait {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using testing_checkpoint::Fill;
using testing_checkpoint::Holds;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

class CheckpointDamageTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing_checkpoint::TempFolder("krait_damage_test");
    std::filesystem::remove_all(dir_);
    for (int64_t step = 1; step <= 2; ++step) {
      State state = SmallState();
      Fill(step, &state);
      ASSERT_TRUE(SaveCheckpoint({dir_, 2, ""}, SmallMeta(step), state.boxes).ok());
    }
    newest_ = dir_ + "/" + StepFolderName(2);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  static std::string Read(const std::string& path) {
    return *ReadFile(path, 1 << 26, ExitCode::kData);
  }
  static void Write(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
  }

  // Loads the newest whole checkpoint and compares every bit; the step, or -1.
  int64_t Load(std::vector<PassedOver>* passed) {
    State state = SmallState();
    const auto loaded = LoadNewestWhole(
        *ListCheckpoints(dir_), [&](const Checkpoint& c) { return LoadBoxes(c, state.boxes); },
        passed);
    if (!loaded.ok() || !Holds(loaded->meta.step, state)) return -1;
    return loaded->meta.step;
  }

  // One damaged file of the newest checkpoint, or a damaged `latest`.
  void ExpectNoticed(const std::string& path, const std::string& damaged) {
    const std::string good = Read(path);
    ASSERT_NE(good, damaged);
    Write(path, damaged);
    std::vector<PassedOver> passed;
    const int64_t step = Load(&passed);
    const std::string hint = CheckLatest(dir_);
    if (path == dir_ + "/latest") {
      EXPECT_EQ(step, 2);  // only a hint: nothing depends on it
      EXPECT_THAT(hint, HasSubstr(path));
    } else {
      EXPECT_EQ(step, 1);
      EXPECT_THAT(passed, SizeIs(1));
      if (!passed.empty()) {
        EXPECT_EQ(passed[0].path, newest_);
        EXPECT_THAT(passed[0].reason, HasSubstr(path));
      }
      const auto report = VerifyCheckpoints({dir_}, false);
      ASSERT_TRUE(report.ok());
      EXPECT_EQ(report->code, ExitCode::kNo);
      EXPECT_THAT(report->text, AllOf(HasSubstr(newest_ + ": damaged\n"), HasSubstr(path),
                                      HasSubstr(StepFolderName(1) + ": whole\n")));
    }
    Write(path, good);
  }

  void FlipsAndTruncations(int count) {
    const std::vector<std::string> files = {newest_ + "/rank-00000.h5", newest_ + "/manifest.json",
                                            dir_ + "/latest"};
    std::mt19937 random(20260301);
    for (int i = 0; i < count && !HasFailure(); ++i) {
      // The shard and the manifest in turn, `latest` now and then; every fifth a truncation.
      const std::string& path = files[i % 10 == 9 ? 2 : static_cast<size_t>(i % 2)];
      std::string bytes = Read(path);
      const size_t at = random() % bytes.size();
      const unsigned bit = random() % 8;
      if (i % 5 == 4) {
        bytes.resize(at);
      } else {
        bytes[at] = static_cast<char>(bytes[at] ^ 1 << bit);
      }
      SCOPED_TRACE(path + ": damage " + std::to_string(i) + " at byte " + std::to_string(at));
      ExpectNoticed(path, bytes);
    }
  }

  std::string dir_, newest_;
};

TEST_F(CheckpointDamageTest, FlipsAndTruncationsOfAllFiles) { FlipsAndTruncations(1000); }

TEST_F(CheckpointDamageTest, LongFlipsAndTruncationsOfAllFiles) { FlipsAndTruncations(20000); }

TEST_F(CheckpointDamageTest, EveryByteOfTheShardIsCovered) {
  const std::string path = newest_ + "/rank-00000.h5";
  const std::string good = Read(path);
  const auto checkpoint = OpenCheckpoint(newest_);
  ASSERT_TRUE(checkpoint.ok());
  for (size_t at = 0; at < good.size(); ++at) {
    std::string bytes = good;
    bytes[at] = static_cast<char>(bytes[at] ^ 0x10);
    Write(path, bytes);
    ASSERT_FALSE(VerifyCheckpoint(*checkpoint).ok()) << at;
  }
}

TEST_F(CheckpointDamageTest, GrownMissingSwappedFiles) {
  for (const char* name : {"/rank-00000.h5", "/manifest.json"}) {
    const std::string path = newest_ + name;
    ExpectNoticed(path, Read(path) + "x");
    ExpectNoticed(path, "");
    const std::string good = Read(path);
    ExpectNoticed(path, Read(dir_ + "/" + StepFolderName(1) + name));
    std::filesystem::remove(path);
    std::vector<PassedOver> passed;
    EXPECT_EQ(Load(&passed), 1);
    EXPECT_THAT(passed.at(0).reason, HasSubstr(path + " is missing"));
    std::filesystem::create_directory(path);
    EXPECT_EQ(Load(&passed), 1);
    EXPECT_THAT(passed.at(1).reason, HasSubstr(path + " is not a regular file"));
    std::filesystem::remove(path);
    Write(path, good);
  }
  std::vector<PassedOver> passed;
  EXPECT_EQ(Load(&passed), 2);
}

// Manifests whose CRC is right but whose content is not: what a bug or an attacker would write.
class HostileManifestTest : public CheckpointDamageTest {
 protected:
  // The text with a valid CRC at its end.
  static std::string Seal(const json& root) {
    json rest = root;
    rest.erase("crc32c");
    std::string body = rest.dump();
    body.back() = ',';
    return body + absl::StrFormat("\"crc32c\":\"%08x\"}\n", Crc32c(body.data(), body.size()));
  }
  // Writes the table of boxes after a change, behind the end of the shard, and a manifest that
  // names it there; the reason for its refusal.
  std::string RefusedTable(const std::function<void(json&)>& change) {
    const std::string shard = newest_ + "/rank-00000.h5", good = Read(shard);
    const std::string table = WithTable(change, good);
    std::string reason = Refused([&](json& root) { NameTable(root, good.size(), table); });
    Write(shard, good);
    return reason;
  }
  // The changed table, written behind the end of the shard.
  std::string WithTable(const std::function<void(json&)>& change, const std::string& shard) {
    const ManifestFile file = OpenCheckpoint(newest_)->files[0];
    json root = json::parse(
        shard.substr(static_cast<size_t>(file.table_at), static_cast<size_t>(file.table_size)));
    change(root);
    std::string table = Seal(root);
    Write(newest_ + "/rank-00000.h5", shard + table);
    return table;
  }
  static void NameTable(json& root, size_t at, const std::string& table) {
    json& file = root["files"][0];
    file["table_at"] = at;
    file["table_size"] = table.size();
    file["crc32c_table"] = Crc32c(table.data(), table.size());
    file["size"] = at + table.size();
  }
  // Writes the manifest after a change; the reason for its refusal.
  std::string Refused(const std::function<void(json&)>& change) {
    json root = json::parse(Read(newest_ + "/manifest.json"));
    change(root);
    return RefusedText(Seal(root));
  }
  std::string RefusedText(const std::string& text) {
    const std::string path = newest_ + "/manifest.json", good = Read(path);
    Write(path, text);
    const absl::Status status = OpenCheckpoint(newest_).status();
    Write(path, good);
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kNoCheckpoint);
    EXPECT_THAT(MessageOf(status), HasSubstr(newest_));
    return MessageOf(status);
  }
};

TEST_F(HostileManifestTest, EveryFieldMissingMistypedOrOutOfRange) {
  const std::string path = newest_ + "/manifest.json";
  const json good = json::parse(Read(path));
  Write(path, Seal(good));
  ASSERT_TRUE(OpenCheckpoint(newest_).ok()) << OpenCheckpoint(newest_).status();

  const std::vector<json> wrong = {nullptr,
                                   true,
                                   -1,
                                   1.5,
                                   uint64_t{1} << 63,
                                   "",
                                   "nonsense",
                                   json::array(),
                                   json::object(),
                                   json::array({-1}),
                                   json::array({uint64_t{1} << 63})};
  int refused = 0;
  using Refuse = std::function<std::string(const std::function<void(json&)>&)>;
  const auto try_all = [&](const json& whole, const json::json_pointer& parent,
                           const Refuse& refuse) {
    for (const auto& item : whole.at(parent).items()) {
      const std::string key = item.key();
      if (key == "crc32c" && parent.empty()) continue;
      SCOPED_TRACE((parent / key).to_string());
      const std::set<std::string> optional = {
          "skipped",    "skipped_in_row", "tokenizer",           "hardware", "mix_start", "sources",
          "validation", "hf_config",      "hf_generation_config"};
      if (!optional.contains(key)) {
        EXPECT_THAT(refuse([&](json& root) { root.at(parent).erase(key); }),
                    HasSubstr("is missing"));
      }
      for (const json& value : wrong) {
        // What happens to be right: any text in these members, a name, no boxes at all.
        if (value.is_string() && (key == "config" || key == "tokenizer" || key == "hardware" ||
                                  key == "hf_config" || key == "hf_generation_config" ||
                                  key == "data_fingerprint" || key == "content" || key == "path")) {
          continue;
        }
        if (key == "weight" && value.is_number() && value.get<double>() > 0) continue;
        if (value == "nonsense" && parent.to_string() == "/boxes/0" &&
            (key == "name" || key == "slot")) {
          continue;
        }
        if (value == json::array() &&
            (key == "boxes" || key == "files" || key == "sources" || key == "validation")) {
          continue;
        }
        refuse([&](json& root) { root.at(parent)[key] = value; });
        ++refused;
      }
    }
  };
  const Refuse manifest = [&](const auto& change) { return Refused(change); };
  const Refuse table = [&](const auto& change) { return RefusedTable(change); };
  const ManifestFile file = OpenCheckpoint(newest_)->files[0];
  const json boxes = json::parse(
      Read(newest_ + "/rank-00000.h5")
          .substr(static_cast<size_t>(file.table_at), static_cast<size_t>(file.table_size)));
  try_all(good, json::json_pointer(), manifest);
  try_all(good, json::json_pointer("/files/0"), manifest);
  try_all(boxes, json::json_pointer(), table);
  try_all(boxes, json::json_pointer("/boxes/0"), table);
  try_all(good, json::json_pointer("/sources/0"), manifest);
  try_all(good, json::json_pointer("/sources/0/shuffles/1"), manifest);
  for (const auto& [from, reason] : {std::pair{0, "does not ascend"}, {21, "up to 20"}}) {
    EXPECT_THAT(
        Refused([from = from](json& root) { root["sources"][0]["shuffles"][1]["from"] = from; }),
        HasSubstr(reason));
  }
  EXPECT_GT(refused, 200);

  EXPECT_THAT(Refused([](json& root) { root["format_version"] = 3; }),
              HasSubstr("format version 3; this Krait reads versions 1 to 2"));
  EXPECT_THAT(Refused([](json& root) { root["format_version"] = 0; }),
              HasSubstr("format version 0"));
  EXPECT_THAT(Refused([](json& root) { root["step"] = 3; }), HasSubstr("is of step 3"));
  EXPECT_THAT(Refused([](json& root) { root["save_id"] = std::string(32, 'g'); }),
              HasSubstr("hexadecimal"));
  EXPECT_THAT(Refused([](json& root) { root["ranks"] = 0; }), HasSubstr("more files than"));
  EXPECT_THAT(RefusedTable([](json& root) { root["save_id"] = std::string(32, 'a'); }),
              HasSubstr("rank-00000.h5: its table of boxes: 'save_id' is that of another save"));
}

TEST_F(HostileManifestTest, MembersOfLaterVersionsAreNoDamage) {
  const std::string path = newest_ + "/manifest.json";
  json root = json::parse(Read(path));
  for (const char* optional : {"skipped", "skipped_in_row", "tokenizer", "hardware", "mix_start",
                               "sources", "validation"}) {
    root.erase(optional);
  }
  root["added_later"] = {{"any", "thing"}};
  root["files"][0]["added_later"] = 1;
  const std::string shard = Read(newest_ + "/rank-00000.h5");
  Checkpoint changed = *OpenCheckpoint(newest_);
  const std::string table = WithTable([](json& t) { t["boxes"][0]["added_later"] = "x"; }, shard);
  NameTable(root, shard.size(), table);
  // The old table is now among the bytes that belong to nothing.
  changed.files[0].table_at = static_cast<int64_t>(shard.size());
  changed.files[0].table_size = static_cast<int64_t>(table.size());
  changed.files[0].size = changed.files[0].table_at + changed.files[0].table_size;
  uint32_t rest = 0;
  const auto outside = RangesOutsideBoxes(changed.files, changed.boxes);
  for (const auto& [begin, end] : outside[0]) {
    rest = Crc32c(&shard[static_cast<size_t>(begin)], static_cast<size_t>(end - begin), rest);
  }
  root["files"][0]["crc32c_rest"] = rest;
  Write(path, Seal(root));
  const auto checkpoint = OpenCheckpoint(newest_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(VerifyCheckpoint(*checkpoint).ok());
  EXPECT_EQ(checkpoint->meta.step, 2);
  EXPECT_EQ(checkpoint->meta.skipped, 0);
  EXPECT_EQ(checkpoint->meta.tokenizer, "");
  EXPECT_TRUE(checkpoint->meta.sources.empty());
  EXPECT_EQ(checkpoint->format_version, 2);
}

TEST_F(HostileManifestTest, FilesOutsideTheFolder) {
  using namespace std::string_literals;
  for (const std::string& name :
       {"../step-00000001/rank-00000.h5"s, "/etc/passwd"s, ".."s, "."s, "a/b"s, "rank\n00000.h5"s,
        ".hidden"s, "manifest.json"s, "rank-00000.h5\0x"s}) {
    SCOPED_TRACE(name);
    Refused([&](json& root) { root["files"][0]["name"] = name; });
  }
  EXPECT_THAT(Refused([](json& root) { root["files"].push_back(root["files"][0]); }),
              HasSubstr("listed twice"));
  EXPECT_THAT(Refused([](json& root) { root["files"][0]["name"] = "rank-00001.h5"; }),
              HasSubstr("rank-00001.h5 is missing"));
  EXPECT_THAT(Refused([](json& root) { root["files"][0]["size"] = int64_t{1} << 40; }),
              HasSubstr("the manifest says 1099511627776"));
}

TEST_F(HostileManifestTest, BoxesThatCannotBe) {
  // Boxes 1 and 2 are the halves of weight in_proj [6, 5].
  const auto box = [](json& root, int i) -> json& { return root["boxes"][static_cast<size_t>(i)]; };
  ASSERT_EQ(OpenCheckpoint(newest_)->boxes[2].offset, (std::vector<int64_t>{3, 0}));
  const ManifestFile file = OpenCheckpoint(newest_)->files[0];
  const auto tile = HasSubstr("do not tile");
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["offset"] = {2, 0}; }), tile);  // overlap, hole
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["extent"] = {2, 5}; }), tile);  // hole
  EXPECT_THAT(RefusedTable([&](json& r) { r["boxes"].erase(1); }), tile);
  EXPECT_THAT(RefusedTable([&](json& r) { r["boxes"].push_back(box(r, 1)); }), tile);  // twice
  EXPECT_THAT(RefusedTable([&](json& r) {
                box(r, 2)["offset"] = {4, 0};
              }),
              HasSubstr("not inside the"));
  EXPECT_THAT(RefusedTable([&](json& r) {
                box(r, 2)["extent"] = {3, 0};
              }),
              HasSubstr("box is empty"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["offset"] = {3}; }),
              HasSubstr("different lengths"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["shape"] = {6, 6}; }), HasSubstr("two shapes"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["dtype"] = "i32"; }), HasSubstr("two dtypes"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["dtype"] = "f16"; }), HasSubstr("'dtype'"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["at"] = box(r, 1)["at"]; }),
              HasSubstr("overlaps"));
  // The table lies behind the old end of the file.
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["at"] = file.size - 1; }),
              HasSubstr("overlaps the table of boxes"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["at"] = file.size + 100000; }),
              HasSubstr("not inside its file"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["crc32c"] = "0123456g"; }),
              HasSubstr("8 hexadecimal digits"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["at"] = INT64_MAX; }),
              HasSubstr("not inside its file"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["name"] = std::string(513, 'a'); }),
              HasSubstr("'name'"));
  EXPECT_THAT(RefusedTable([&](json& r) { box(r, 2)["slot"] = "a/b"; }), HasSubstr("'slot'"));
  EXPECT_THAT(RefusedTable([&](json& r) {
                box(r, 0)["shape"] = box(r, 0)["extent"] = {int64_t{1} << 62, 4};
              }),
              HasSubstr("overflows"));
  EXPECT_THAT(RefusedTable([&](json& r) {
                box(r, 0)["shape"] = {1, 1, 1, 1, 1};
              }),
              HasSubstr("up to 4"));
}

TEST_F(HostileManifestTest, TextsThatAreNoManifest) {
  const auto seal = [](std::string body) {
    return body + absl::StrFormat("\"crc32c\":\"%08x\"}\n", Crc32c(body.data(), body.size()));
  };
  EXPECT_THAT(RefusedText(seal("")), HasSubstr("not JSON"));
  EXPECT_THAT(RefusedText(seal("[")), HasSubstr("not JSON"));
  EXPECT_THAT(RefusedText(seal("{\"format_version\":1,\"format_version\":1,")),
              HasSubstr("appears twice"));
  EXPECT_THAT(RefusedText(seal("{\"format_version\":1,\"files\":" + std::string(100000, '['))),
              HasSubstr("nested deeper"));
  EXPECT_THAT(RefusedText(seal("{")), HasSubstr("'format_version' is missing"));
  EXPECT_THAT(RefusedText(std::string(100, '\0')), HasSubstr("CRC32C"));
  const std::string path = newest_ + "/manifest.json";
  std::filesystem::resize_file(path, kMaxManifestBytes + 1);  // a hole, not 64 MiB on disk
  EXPECT_THAT(MessageOf(OpenCheckpoint(newest_).status()), HasSubstr("at most 67108864"));
}

// The tiling rule on its own: random cuts tile; one box moved, grown, shrunk, doubled or lost does
// not.
TEST_F(HostileManifestTest, TilingsOfRandomCuts) {
  std::mt19937 random(7);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  int misfits = 0;
  for (int round = 0; round < 200; ++round) {
    const size_t rank = 1 + static_cast<size_t>(below(4));
    struct Box {
      std::vector<int64_t> offset, extent;
    };
    std::vector<int64_t> shape;
    for (size_t d = 0; d < rank; ++d) shape.push_back(1 + below(9));
    std::vector<Box> boxes = {{std::vector<int64_t>(rank, 0), shape}};
    for (int cuts = 0; cuts < 12; ++cuts) {  // guillotine cuts of random boxes
      const auto b = static_cast<size_t>(below(static_cast<int64_t>(boxes.size())));
      const auto d = static_cast<size_t>(below(static_cast<int64_t>(rank)));
      if (boxes[b].extent[d] < 2) continue;
      const int64_t at = 1 + below(boxes[b].extent[d] - 1);
      Box upper = boxes[b];
      upper.offset[d] += at;
      upper.extent[d] -= at;
      boxes[b].extent[d] = at;
      boxes.push_back(upper);
    }
    const auto parse = [&] {
      Checkpoint checkpoint;
      checkpoint.save_id = std::string(32, '0');
      int64_t at = 0;
      for (const Box& b : boxes) {
        checkpoint.boxes.push_back(
            {"weight", "x", DType::kF32, shape, b.offset, b.extent, 0, at, 0});
        at += checkpoint.boxes.back().bytes();
      }
      checkpoint.files = {{"f", at, 0}};
      // Through the text of a table and back.
      const std::string table = TableText(checkpoint.save_id, checkpoint.boxes);
      checkpoint.boxes.clear();
      checkpoint.files[0].size += static_cast<int64_t>(table.size());
      checkpoint.files[0].table_at = at;
      checkpoint.files[0].table_size = static_cast<int64_t>(table.size());
      checkpoint.files[0].table_crc = Crc32c(table.data(), table.size());
      const absl::Status parsed = ParseTable(table, 0, &checkpoint);
      return parsed.ok() ? CheckBoxes(checkpoint) : parsed;
    };
    ASSERT_TRUE(parse().ok()) << parse();
    if (boxes.size() < 2) continue;
    const auto b = static_cast<size_t>(below(static_cast<int64_t>(boxes.size())));
    const auto d = static_cast<size_t>(below(static_cast<int64_t>(rank)));
    const std::vector<Box> good = boxes;
    switch (below(5)) {
      case 0:
        boxes[b].offset[d] += boxes[b].offset[d] > 0 ? -1 : 1;
        break;
      case 1:
        boxes[b].extent[d] += 1;
        break;
      case 2:
        boxes[b].extent[d] -= 1;
        break;
      case 3:
        boxes.push_back(boxes[b]);
        break;
      default:
        boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(b));
    }
    EXPECT_FALSE(parse().ok()) << "round " << round;
    ++misfits;
  }
  EXPECT_GT(misfits, 100);
}

}  // namespace
}  // namespace krait
