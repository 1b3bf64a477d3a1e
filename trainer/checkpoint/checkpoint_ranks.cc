#include "trainer/checkpoint/checkpoint_ranks.h"

#include <memory>

namespace krait {

World* OrAlone(World* world) {
  static const std::unique_ptr<World> alone = OneRankWorld();
  return world != nullptr ? world : alone.get();
}

absl::Status StatusOfFirst(World* world, const absl::Status& status) {
  if (world->size() == 1) return status;
  const auto code =
      static_cast<ExitCode>(world->AllGather(static_cast<int64_t>(ExitCodeOf(status)))[0]);
  if (code == ExitCode::kOk) return absl::OkStatus();
  // All say the same, so that it is told without a rank.
  return Agree(world, Error(code, world->Broadcast(MessageOf(status))));
}

absl::StatusOr<std::vector<std::string>> PathsOfFirst(
    World* world, const absl::StatusOr<std::vector<std::string>>& paths) {
  if (world->size() == 1) return paths;
  KRAIT_RETURN_IF_ERROR(StatusOfFirst(world, paths.status()));
  std::string text;  // each with the one byte that no path has behind it
  if (world->first()) {
    for (const std::string& path : *paths) text += path + '\0';
  }
  text = world->Broadcast(text);
  std::vector<std::string> shared;
  for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = text.find('\0', begin);
    shared.push_back(text.substr(begin, end - begin));
  }
  return shared;
}

}  // namespace krait
