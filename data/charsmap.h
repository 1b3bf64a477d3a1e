// What libsentencepiece follows without a look: the precompiled character maps of a model. Standard
// types only, as sentencepiece.h.
#ifndef KRAIT_DATA_CHARSMAP_H_
#define KRAIT_DATA_CHARSMAP_H_

#include <string>
#include <string_view>

namespace krait {

// `model`: a serialized ModelProto (sentencepiece_model.proto). An empty string, or why one of its
// maps would lead out of its memory. A model that is none is left to the library's own checks.
//
// A map is the size of a double array in bytes, that array (darts-clone: u32 units with the offset
// of their children) and strings that end with zero, to which its values point.
std::string CheckCharsMaps(std::string_view model);

}  // namespace krait

#endif  // KRAIT_DATA_CHARSMAP_H_
