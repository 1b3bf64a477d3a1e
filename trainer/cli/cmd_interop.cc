// krait import, krait export
#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "trainer/cli/commands.h"
#include "trainer/tools/interop.h"

namespace krait {
namespace {

absl::StatusOr<ExitCode> Import(const ImportOptions& options) {
  KRAIT_RETURN_IF_ERROR(ImportHf(options));
  absl::PrintF("%s: weights of %s; krait train CONFIG --init %s starts from them\n", options.out,
               options.hf, options.out);
  return ExitCode::kOk;
}

absl::StatusOr<ExitCode> Export(const ExportOptions& options) {
  ExportReport report;
  KRAIT_ASSIGN_OR_RETURN(report, ExportHf(options));
  absl::PrintF("%s: %d tensors, %s in %d file%s, of %s\n", options.hf, report.tensors,
               PrintBytes(report.bytes), report.files, report.files == 1 ? "" : "s",
               report.checkpoint);
  return ExitCode::kOk;
}

}  // namespace

void AddInteropCommands(CLI::App* app, CommandLine* line) {
  auto in = std::make_shared<ImportOptions>();
  CLI::App* from_hf =
      app->add_subcommand("import", "Make a checkpoint of a Hugging Face Jamba folder.");
  from_hf->add_option("--hf", in->hf, "the folder: config.json and safetensors weights")
      ->required()
      ->type_name("DIR");
  from_hf->add_option("--out", in->out, "the checkpoint to make")
      ->required()
      ->type_name("CHECKPOINT");
  from_hf->add_option("--tokenizer", in->tokenizer, "the model's tokenizer: bytes")
      ->type_name("NAME");
  from_hf->callback([line, in] { line->run = [in] { return Import(*in); }; });

  auto out = std::make_shared<ExportOptions>();
  CLI::App* to_hf =
      app->add_subcommand("export", "Write a checkpoint's weights as a Hugging Face Jamba folder.");
  to_hf->add_option("checkpoint", out->checkpoint, "a checkpoint, or a run folder")
      ->required()
      ->type_name("CHECKPOINT");
  to_hf->add_option("--hf", out->hf, "the folder to make")->required()->type_name("DIR");
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
  to_hf->callback([line, out] { line->run = [out] { return Export(*out); }; });
}

}  // namespace krait
