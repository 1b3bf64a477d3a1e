// SentencePiece models (tokenizer.h).
#include "absl/strings/str_format.h"
#include "data/sentencepiece.h"
#include "data/tokenizer_kinds.h"
#include "kernels/base/utf8.h"

namespace krait {
namespace {

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(std::shared_ptr<const SentencePieceModel> model, std::string name,
                         std::optional<int32_t> end, bool add_start)
      : model_(std::move(model)), add_start_(add_start) {
    name_ = std::move(name);
    vocab_size_ = model_->size();
    end_token_ = end;
    // As transformers does for models that have a start token.
    if (add_start_ && model_->start_id() >= 0) prefix_ = {model_->start_id()};
  }

  absl::Status Encode(std::string_view text, std::vector<int32_t>* ids) override {
    // The library would put U+FFFD in its place.
    for (size_t i = 0; i < text.size();) {
      const size_t length = Utf8Length(text, i);
      if (length == 0) {
        return Error(ExitCode::kData,
                     absl::StrFormat("byte %d of the text is no UTF-8, and a SentencePiece model "
                                     "encodes nothing else",
                                     i));
      }
      i += length;
    }
    const std::string fault = model_->Encode(text, ids);
    if (fault.empty()) return absl::OkStatus();
    return Error(ExitCode::kData, "SentencePiece cannot encode the text: " + fault);
  }

  std::string Decode(int32_t id, bool at_start) const override {
    return model_->Decode(id, at_start);
  }

  std::string TokenText(int32_t id) const override { return model_->Piece(id); }

  std::unique_ptr<Tokenizer> Share() const override {
    return std::make_unique<SentencePieceTokenizer>(model_, name_, end_token_, add_start_);
  }

 private:
  std::shared_ptr<const SentencePieceModel> model_;
  bool add_start_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeSentencePieceTokenizer(std::string_view model,
                                                                      const EndToken& end,
                                                                      bool add_start,
                                                                      const std::string& place) {
  std::string fault;
  std::shared_ptr<const SentencePieceModel> loaded = SentencePieceModel::Load(model, &fault);
  if (loaded == nullptr) {
    return Error(ExitCode::kData, place + " is no SentencePiece model: " + fault);
  }
  std::optional<int32_t> id;
  if (loaded->end_id() >= 0) id = loaded->end_id();
  if (!end.text.empty()) {
    id = loaded->Find(end.text);
    if (*id < 0) {
      return Error(ExitCode::kData, absl::StrFormat("%s: the end token \"%s\" that %s names is no "
                                                    "piece of it",
                                                    place, end.text, end.said_by));
    }
  }
  return std::unique_ptr<Tokenizer>(std::make_unique<SentencePieceTokenizer>(
      std::move(loaded), "sentencepiece-" + TokenizerHash(model), id, add_start));
}

}  // namespace krait
