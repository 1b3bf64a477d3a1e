// krait import, krait export
#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "kernels/base/shell.h"
#include "kernels/base/stop_signals.h"
#include "nlohmann/json.hpp"
#include "trainer/cli/commands.h"
#include "trainer/report/progress_line.h"
#include "trainer/tools/interop.h"

namespace krait {
namespace {

std::string Dump(const nlohmann::ordered_json& json) {
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

// Draws on standard error, and ends the work when a stop is requested.
class ShownProgress {
 public:
  explicit ShownProgress(std::string what)
      : what_(std::move(what)), line_(what_, ProgressLine::OnStandardError()) {}
  ~ShownProgress() { ProgressLine::ClearStandardError(); }
  Progress progress() {
    return [this](int64_t done, int64_t total) {
      line_.Update(done, total);
      return StopRequested() ? Error(ExitCode::kStopped,
                                     "stopped on request while " + what_ + ": nothing was made")
                             : absl::OkStatus();
    };
  }

 private:
  StopSignals signals_{"stopping; once more to end at once"};
  std::string what_;
  ProgressLine line_;
};

absl::StatusOr<ExitCode> Import(ImportOptions options, bool json) {
  {
    ShownProgress shown("importing");
    options.progress = shown.progress();
    KRAIT_RETURN_IF_ERROR(ImportHf(options, PrintNotice));
  }
  KRAIT_RETURN_IF_ERROR(Print(
      json ? Dump({{"checkpoint", options.out}, {"hf", options.hf}})
           : absl::StrFormat("%s: weights of %s; krait train CONFIG --init %s starts from them\n",
                             options.out, options.hf, ShellQuoted(options.out))));
  return ExitCode::kOk;
}

absl::StatusOr<ExitCode> Export(ExportOptions options, bool json) {
  ExportReport report;
  {
    ShownProgress shown("exporting");
    options.progress = shown.progress();
    KRAIT_ASSIGN_OR_RETURN(report, ExportHf(options, PrintNotice));
  }
  KRAIT_RETURN_IF_ERROR(
      Print(json ? Dump({{"hf", options.hf},
                         {"checkpoint", report.checkpoint},
                         {"tensors", report.tensors},
                         {"bytes", report.bytes},
                         {"files", report.files}})
                 : absl::StrFormat("%s: %d tensors, %s in %d file%s, of %s\n", options.hf,
                                   report.tensors, PrintBytes(report.bytes), report.files,
                                   report.files == 1 ? "" : "s", report.checkpoint)));
  return ExitCode::kOk;
}

}  // namespace

void AddInteropCommands(CLI::App* app, CommandLine* line) {
  auto in = std::make_shared<ImportOptions>();
  auto json = std::make_shared<bool>(false);
  CLI::App* from_hf =
      app->add_subcommand("import", "Make a checkpoint of a Hugging Face Jamba folder.");
  AddPath(from_hf, "--hf", &in->hf, "the folder: config.json and safetensors weights", "DIR")
      ->required();
  AddPath(from_hf, "--out", &in->out, "the checkpoint to make", "CHECKPOINT")->required();
  AddForce(from_hf, &in->force);
  from_hf
      ->add_option("--tokenizer", in->tokenizer,
                   "the model's tokenizer (default: the one in the folder)")
      ->type_name("bytes|FILE");
  from_hf->add_flag("--json", *json, "one JSON object");
  from_hf->callback([line, in, json] {
    line->stops = true;
    line->run = [in, json] { return Import(*in, *json); };
  });

  auto out = std::make_shared<ExportOptions>();
  CLI::App* to_hf =
      app->add_subcommand("export", "Write a checkpoint's weights as a Hugging Face Jamba folder.");
  AddPath(to_hf, "checkpoint", &out->checkpoint, "a checkpoint, or a run folder", "CHECKPOINT")
      ->required();
  AddPath(to_hf, "--hf", &out->hf, "the folder to make", "DIR")->required();
  AddForce(to_hf, &out->force);
  to_hf
      ->add_option("--tokenizer", out->tokenizer,
                   "instead of the checkpoint's: bytes, a tokenizer.json or a SentencePiece model")
      ->type_name("bytes|FILE");
  to_hf->add_flag("--json", *json, "one JSON object");
  to_hf
      ->add_option_function<std::string>(
          "--dtype",
          [out](const std::string& name) {
            if (name != "f32" && name != "bf16") {
              throw CLI::ValidationError("--dtype", name + " is neither f32 nor bf16");
            }
            out->dtype = name == "f32" ? DType::kF32 : DType::kBF16;
          },
          "of the weights (default f32)")
      ->type_name("f32|bf16");
  to_hf
      ->add_option_function<std::string>(
          "--shard-size",
          [out](const std::string& text) {
            std::string why;
            const auto bytes = ParseBytes(text, &why);
            if (!bytes.has_value()) throw CLI::ValidationError("--shard-size", text + " " + why);
            if (*bytes < 1) throw CLI::ValidationError("--shard-size", "must be above 0");
            out->shard_bytes = *bytes;
          },
          "largest weight file before a further one is begun (default 5GiB)")
      ->type_name("SIZE");
  to_hf->callback([line, out, json] {
    line->stops = true;
    line->run = [out, json] { return Export(*out, *json); };
  });
}

}  // namespace krait
