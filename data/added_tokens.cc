#include "data/added_tokens.h"

#include <algorithm>
#include <functional>

#include "absl/strings/string_view.h"

namespace krait {
namespace {

// Unicode's White_Space.
constexpr std::string_view kSpaces[] = {
    "\t",           "\n",           "\v",           "\f",           "\r",           " ",
    "\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81", "\xE2\x80\x82",
    "\xE2\x80\x83", "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86", "\xE2\x80\x87", "\xE2\x80\x88",
    "\xE2\x80\x89", "\xE2\x80\x8A", "\xE2\x80\xA8", "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F",
    "\xE3\x80\x80"};

}  // namespace

AddedTokenFinder::AddedTokenFinder(const std::vector<AddedToken>& tokens) {
  for (const AddedToken& token : tokens) {
    tokens_.emplace(token.content, token);
    std::vector<size_t>& lengths = lengths_[static_cast<unsigned char>(token.content.front())];
    if (std::find(lengths.begin(), lengths.end(), token.content.size()) == lengths.end()) {
      lengths.push_back(token.content.size());
    }
  }
  for (std::vector<size_t>& lengths : lengths_) {
    std::sort(lengths.begin(), lengths.end(), std::greater<>());
  }
}

const AddedToken* AddedTokenFinder::At(std::string_view text, size_t i) const {
  for (const size_t length : lengths_[static_cast<unsigned char>(text[i])]) {
    if (length > text.size() - i) continue;
    const auto found = tokens_.find(absl::string_view(text.data() + i, length));
    if (found != tokens_.end()) return &found->second;
  }
  return nullptr;
}

size_t AddedTokenFinder::SpaceBefore(std::string_view text, size_t end) {
  for (bool more = true; more;) {
    more = false;
    for (const std::string_view space : kSpaces) {
      if (!text.substr(0, end).ends_with(space)) continue;
      end -= space.size();
      more = true;
    }
  }
  return end;
}

size_t AddedTokenFinder::SpaceAfter(std::string_view text, size_t begin) {
  for (bool more = true; more;) {
    more = false;
    for (const std::string_view space : kSpaces) {
      if (!text.substr(begin).starts_with(space)) continue;
      begin += space.size();
      more = true;
    }
  }
  return begin;
}

}  // namespace krait
