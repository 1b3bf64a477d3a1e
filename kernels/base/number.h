// Numbers as people write and read them: 4Mi, 100B, 1e9, 51,570,323,328, 62.1 GiB.
#ifndef KRAIT_KERNELS_BASE_NUMBER_H_
#define KRAIT_KERNELS_BASE_NUMBER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace krait {

// Decimal numbers: an optional minus, digits that may carry `_` between them, an optional fraction,
// an optional exponent, and an optional suffix k, M, B, T (powers of 1000) or Ki, Mi, Gi (powers of
// 1024). Leading zeros, hexadecimal, spaces, a plus sign, infinities and NaN are refused. On
// failure the result is empty and `*why` (may be null) completes the sentence "TEXT ...".

// A whole number: fractions and exponents are accepted where the value is exact (1.5M, 1e9).
std::optional<int64_t> ParseInteger(std::string_view text, std::string* why = nullptr);
// The nearest double; a value outside its range is refused.
std::optional<double> ParseNumber(std::string_view text, std::string* why = nullptr);
// A size in bytes: besides the suffixes above also G, Ti, and any of them followed by B for bytes
// (80GiB, 512MB; a lone B stays 10^9, so 80B is 80 billion).
std::optional<int64_t> ParseBytes(std::string_view text, std::string* why = nullptr);

// The shortest text that ParseNumber reads back to the same double. `x` must be finite.
std::string PrintNumber(double x);
// 51570323328 -> "51,570,323,328".
std::string PrintGrouped(int64_t n);
// Three significant digits and a suffix: 1240000 -> "1.24M", 999 -> "999", 8.247e9 -> "8.25B".
std::string PrintShort(double x);
// 4294967296 -> "4.00 GiB", 512 -> "512 B".
std::string PrintBytes(int64_t bytes);

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_NUMBER_H_
