#include "data/sentencepiece.h"

#include <sentencepiece_processor.h>

#include <charconv>
#include <exception>
#include <system_error>

#include "data/charsmap.h"

namespace krait {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581

}  // namespace

struct SentencePieceModel::Library {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceModel::SentencePieceModel() : library_(std::make_unique<Library>()) {}
SentencePieceModel::~SentencePieceModel() = default;

std::unique_ptr<SentencePieceModel> SentencePieceModel::Load(std::string_view model,
                                                             std::string* error) {
  *error = CheckCharsMaps(model);
  if (!error->empty()) return nullptr;
  std::unique_ptr<SentencePieceModel> result(new SentencePieceModel());
  sentencepiece::SentencePieceProcessor& processor = result->library_->processor;
  sentencepiece::util::Status status;
  // Its tries throw where pieces are none.
  try {
    status = processor.LoadFromSerializedProto(model);
  } catch (const std::exception& thrown) {
    *error = thrown.what();
    return nullptr;
  }
  if (!status.ok() || processor.GetPieceSize() <= 0) {
    *error = status.ok() ? "it has no pieces" : status.ToString();
    return nullptr;
  }
  return result;
}

int SentencePieceModel::size() const { return library_->processor.GetPieceSize(); }
int SentencePieceModel::end_id() const { return library_->processor.eos_id(); }
int SentencePieceModel::start_id() const { return library_->processor.bos_id(); }

std::string SentencePieceModel::Piece(int32_t id) const {
  return id >= 0 && id < size() ? library_->processor.IdToPiece(id) : "";
}

int SentencePieceModel::Find(const std::string& piece) const {
  const int id = library_->processor.PieceToId(piece);
  if (id < 0 || id >= size() || library_->processor.IdToPiece(id) != piece) return -1;
  return id;
}

std::string SentencePieceModel::Encode(std::string_view text, std::vector<int32_t>* ids) const {
  std::vector<int> found;
  try {
    const auto status = library_->processor.Encode(text, &found);
    if (!status.ok()) return status.ToString();
  } catch (const std::exception& thrown) {
    return thrown.what();
  }
  ids->insert(ids->end(), found.begin(), found.end());
  return "";
}

std::string SentencePieceModel::Decode(int32_t id, bool at_start) const {
  const sentencepiece::SentencePieceProcessor& processor = library_->processor;
  if (id < 0 || id >= size() || processor.IsControl(id)) return "";
  const std::string& piece = processor.IdToPiece(id);
  if (processor.IsByte(id)) {
    unsigned byte = 0;  // <0xE4>
    const bool read =
        piece.size() == 6 &&
        std::from_chars(piece.data() + 3, piece.data() + 5, byte, 16).ec == std::errc();
    return read ? std::string(1, static_cast<char>(byte)) : "";
  }
  std::string text;
  // Later on a piece is its own text, the sign for a space a space; the unknown one is as it is at
  // the start.
  if (at_start || processor.IsUnknown(id)) {
    return processor.Decode(std::vector<int>{id}, &text).ok() ? text : "";
  }
  for (size_t at = 0; at < piece.size();) {
    const bool space = std::string_view(piece).substr(at).starts_with(kSpace);
    text += space ? ' ' : piece[at];
    at += space ? kSpace.size() : 1;
  }
  return text;
}

}  // namespace krait
