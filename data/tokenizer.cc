#include "data/tokenizer.h"

namespace krait {
namespace {

class ByteTokenizer : public Tokenizer {
 public:
  std::string name() const override { return "bytes"; }
  int64_t vocab_size() const override { return 256; }
  void Encode(std::string_view text, std::vector<int32_t>* ids) const override {
    for (const char c : text) ids->push_back(static_cast<unsigned char>(c));
  }
  bool splits_anywhere() const override { return true; }
  std::string Decode(int32_t id) const override {
    return id >= 0 && id < 256 ? std::string(1, static_cast<char>(id)) : std::string();
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(const std::string& name) {
  if (name == "bytes") return std::unique_ptr<Tokenizer>(std::make_unique<ByteTokenizer>());
  return Error(ExitCode::kConfig, "tokenizer " + name +
                                      ": only \"bytes\" exists so far; tokenizer.json and "
                                      "SentencePiece models are not supported yet");
}

}  // namespace krait
