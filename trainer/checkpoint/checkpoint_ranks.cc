#include "trainer/checkpoint/checkpoint_ranks.h"

namespace krait {

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
