// UTF-8 in bytes that may be none.
#ifndef KRAIT_KERNELS_BASE_UTF8_H_
#define KRAIT_KERNELS_BASE_UTF8_H_

#include <cstddef>
#include <string_view>

namespace krait {

// Length of the UTF-8 sequence at text[i], 0 when it is none (RFC 3629: no overlong forms, no
// surrogates, nothing above U+10FFFF).
size_t Utf8Length(std::string_view text, size_t i);

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_UTF8_H_
