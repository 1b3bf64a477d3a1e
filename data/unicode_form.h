// Unicode normalisation forms, by utf8proc.
#ifndef KRAIT_DATA_UNICODE_FORM_H_
#define KRAIT_DATA_UNICODE_FORM_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace krait {

enum class UnicodeForm : uint8_t { kNfc, kNfd, kNfkc, kNfkd };

// `text`, which is UTF-8, in a form.
std::string InForm(std::string_view text, UnicodeForm form);

}  // namespace krait

#endif  // KRAIT_DATA_UNICODE_FORM_H_
