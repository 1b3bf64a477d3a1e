#include "data/charsmap.h"

#include <cstdint>
#include <cstring>
#include <functional>

namespace krait {
namespace {

// Fields of sentencepiece_model.proto.
constexpr uint64_t kNormalizerSpec = 3, kDenormalizerSpec = 5, kPrecompiledCharsMap = 2;

bool ReadVarint(std::string_view* left, uint64_t* value) {
  *value = 0;
  for (unsigned shift = 0; shift < 64 && !left->empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(left->front());
    left->remove_prefix(1);
    *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

// Calls `see` with each field of a message that has a length, until the message ends or is none.
void ForEachBytes(std::string_view message,
                  const std::function<void(uint64_t field, std::string_view bytes)>& see) {
  while (!message.empty()) {
    uint64_t tag = 0, size = 0;
    if (!ReadVarint(&message, &tag)) return;
    switch (tag & 7) {
      case 0:
        if (!ReadVarint(&message, &size)) return;
        continue;
      case 1:
        size = 8;
        break;
      case 2:
        if (!ReadVarint(&message, &size)) return;
        break;
      case 5:
        size = 4;
        break;
      default:
        return;
    }
    if (size > message.size()) return;
    if ((tag & 7) == 2) see(tag >> 3, message.substr(0, size));
    message.remove_prefix(size);
  }
}

uint32_t UnitAt(std::string_view bytes, size_t i) {
  uint32_t unit = 0;
  std::memcpy(&unit, bytes.data() + 4 * i, sizeof unit);
  return unit;
}

std::string CheckMap(std::string_view map) {
  if (map.size() <= 4) return "";  // none, or one that the library refuses
  const uint32_t bytes = UnitAt(map, 0);
  if (bytes >= map.size() - 4) return "";  // likewise
  const std::string_view units = map.substr(4, bytes), strings = map.substr(4 + size_t{bytes});
  const size_t count = units.size() / 4;
  if (count == 0) return "its character map is empty";
  for (size_t i = 0; i < count; ++i) {
    const uint32_t unit = UnitAt(units, i);
    if (unit >> 31 != 0) continue;  // a value, which is looked at where it belongs
    const uint32_t offset = (unit >> 10) << ((unit & (1u << 9)) >> 6);
    const size_t children = i ^ offset;
    // A child is found at children ^ byte.
    if ((children | 0xff) >= count) return "its character map leads out of itself";
    const bool has_value = (unit >> 8 & 1) != 0;
    if (has_value && (UnitAt(units, children) & 0x7fffffff) >= strings.size()) {
      return "its character map points behind its strings";
    }
  }
  return "";
}

}  // namespace

std::string CheckCharsMaps(std::string_view model) {
  std::string error;
  ForEachBytes(model, [&](uint64_t field, std::string_view spec) {
    if (field != kNormalizerSpec && field != kDenormalizerSpec) return;
    ForEachBytes(spec, [&](uint64_t part, std::string_view map) {
      if (part == kPrecompiledCharsMap && error.empty()) error = CheckMap(map);
    });
  });
  return error;
}

}  // namespace krait
