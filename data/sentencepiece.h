// The one user of libsentencepiece. Its header declares names of Abseil's for itself, so that no
// file may see both: this one knows standard types only.
#ifndef KRAIT_DATA_SENTENCEPIECE_H_
#define KRAIT_DATA_SENTENCEPIECE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

// A SentencePiece model. Const functions may be called from several threads.
class SentencePieceModel {
 public:
  // `error` gets the reason when the result is null.
  static std::unique_ptr<SentencePieceModel> Load(std::string_view model, std::string* error);
  ~SentencePieceModel();

  int size() const;
  int end_id() const;                        // -1: none
  int start_id() const;                      // -1: none
  std::string Piece(int32_t id) const;       // as the model has it; "" where there is none
  int Find(const std::string& piece) const;  // -1: none
  // Appends the ids of a text. An empty string, or the reason why not.
  std::string Encode(std::string_view text, std::vector<int32_t>* ids) const;
  // What an id adds to a text, as its first token or later.
  std::string Decode(int32_t id, bool at_start) const;

 private:
  struct Library;
  SentencePieceModel();
  std::unique_ptr<Library> library_;
};

}  // namespace krait

#endif  // KRAIT_DATA_SENTENCEPIECE_H_
