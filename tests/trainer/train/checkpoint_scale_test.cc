// The tables and the manifest of a checkpoint of 1,024 ranks: as many boxes as such a job has, of
// files without data.
#include <gtest/gtest.h>
#include <unistd.h>

#include <ctime>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/crc32c.h"
#include "kernels/base/file.h"
#include "model/layout.h"
#include "paths.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_boxes.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_save.h"
#include "trainer/checkpoint/checkpoint_testing.h"
#include "trainer/config/config.h"

namespace krait {
namespace {

// Of this process's one core: others may share the machine.
double Now() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

// The boxes of one rank as a save cuts them: weights, and moments of what is trained.
std::vector<CheckpointBox> BoxesOf(const Layout& layout) {
  std::vector<CheckpointBox> boxes;
  const std::vector<OwnedBox> parts = layout.Owned();
  for (const char* slot : {"weight", "exp_avg", "exp_avg_sq"}) {
    for (const OwnedBox& part : parts) {
      const Param& param = layout.table().params()[part.box.param];
      if (!param.trainable && slot[0] != 'w') continue;
      boxes.push_back(
          {slot, param.name, DType::kF32, param.shape, part.box.offset, part.box.extent});
    }
  }
  return boxes;
}

// Places of the boxes in a file, as HDF5 aligns them.
std::vector<ManifestBox> PlacesOf(const std::vector<CheckpointBox>& boxes, int64_t file) {
  std::vector<ManifestBox> out;
  int64_t at = 1 << 16;
  for (const BoxPart& part : CutBoxes(boxes, SaveOptions().box_bytes)) {
    const CheckpointBox& box = boxes[part.box];
    out.push_back({box.slot, box.name, box.dtype, box.shape, part.offset, part.extent, file, at,
                   static_cast<uint32_t>(out.size() * 0x9E3779B9u)});
    at += (out.back().bytes() + 4095) / 4096 * 4096;
  }
  return out;
}

TEST(CheckpointScale, LongTablesOf1024Ranks) {
  const auto config =
      LoadConfig(KRAIT_SOURCE_DIR "/configs/models/jamba-v0.1.yaml", {}, ConfigUse::kPlan, 1);
  ASSERT_TRUE(config.ok()) << config.status();
  const std::string dir = testing_checkpoint::TempFolder("krait_checkpoint_scale_test");
  std::filesystem::remove_all(dir);
  Mesh mesh{.data = 128, .tensor = 8, .expert = 16};
  const ParamTable table(config->model, mesh.tensor);
  CheckpointMeta meta = testing_checkpoint::SmallMeta(1000);
  meta.config_yaml = config->ToYaml();
  const auto save = BeginSave({dir, 2, ""}, meta, {}, nullptr);
  ASSERT_TRUE(save.ok()) << save.status();
  const std::string folder = dir + "/" + StepFolderName(1000);
  std::vector<std::string> reports;
  double layouts = 0, written = 0;
  int64_t boxes = 0, table_bytes = 0, data_bytes = 0, most = 0;
  for (mesh.rank = 0; mesh.rank < mesh.world(); ++mesh.rank) {
    double begin = Now();
    const std::vector<ManifestBox> places = PlacesOf(BoxesOf(Layout(&table, mesh)), mesh.rank);
    layouts += Now() - begin;
    for (const ManifestBox& box : places) data_bytes += box.bytes();
    boxes += static_cast<int64_t>(places.size());
    most = std::max(most, static_cast<int64_t>(places.size()));

    begin = Now();
    const std::string text = TableText(save->save_id, places);
    ManifestFile file{absl::StrFormat("rank-%05d.h5", mesh.rank), 0, 0};
    file.table_at = places.back().file_offset + places.back().bytes();
    file.table_size = static_cast<int64_t>(text.size());
    file.table_crc = Crc32c(text.data(), text.size());
    file.size = file.table_at + file.table_size;
    auto out = File::Create(folder + "." + save->save_id + ".tmp/" + file.name, /*exclusive=*/true,
                            ExitCode::kCannotSave);
    ASSERT_TRUE(out.ok()) << out.status();
    ASSERT_TRUE(out->WriteAt(text.data(), text.size(), file.table_at).ok());
    ASSERT_TRUE(out->Sync().ok());
    ASSERT_TRUE(out->Close().ok());
    reports.push_back(FileText(file));
    table_bytes += file.table_size;
    written += Now() - begin;
  }
  double begin = Now();
  const absl::Status ended = EndSave(*save, reports, nullptr);
  const double end = Now() - begin;
  ASSERT_TRUE(ended.ok()) << ended;
  const auto text_size = std::filesystem::file_size(folder + "/manifest.json");
  EXPECT_LT(text_size, size_t{1} << 20);

  begin = Now();
  const auto manifest = ReadManifest(folder);
  const double manifest_read = Now() - begin;
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  begin = Now();
  const auto opened = OpenCheckpoint(folder);
  const double open = Now() - begin;
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->boxes.size(), static_cast<size_t>(boxes));
  absl::PrintF(
      "1,024 ranks (data 128, tensor 8, expert 16) of Jamba Mini: %.1f GB in %d boxes, at most %d "
      "of a rank; tables %.1f MB, manifest %d bytes\n"
      "tables written %.2f s (each with fsync), save ended %.2f s, manifest read %.2f s, opened "
      "and "
      "checked %.2f s; beside that %.2f s for the layouts\n",
      static_cast<double>(data_bytes) * 1e-9, boxes, most, static_cast<double>(table_bytes) * 1e-6,
      text_size, written, end, manifest_read, open, layouts);
#ifndef KRAIT_SANITIZE
  EXPECT_LT(written + end + open, 10);
#endif
  // A tensor of which one box is gone is noticed among all of them.
  std::filesystem::resize_file(folder + "/rank-00512.h5", 1 << 20);
  EXPECT_EQ(ExitCodeOf(OpenCheckpoint(folder).status()), ExitCode::kNoCheckpoint);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace krait
