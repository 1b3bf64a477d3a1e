// Words and paths between users and their shells.
#ifndef KRAIT_KERNELS_BASE_SHELL_H_
#define KRAIT_KERNELS_BASE_SHELL_H_

#include <string>
#include <string_view>

namespace krait {

// The word as it is where a shell takes it so, else in single quotes.
std::string ShellQuoted(std::string_view word);

// A path as a user wrote it: without slashes at its end, and with a leading "~/" (which a shell
// expands only at the start of a word) replaced by the home folder.
std::string UserPath(std::string_view path);

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_SHELL_H_
