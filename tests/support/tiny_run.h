// A tiny hybrid, generated text, and the krait command over them.
#ifndef KRAIT_TESTS_SUPPORT_TINY_RUN_H_
#define KRAIT_TESTS_SUPPORT_TINY_RUN_H_

#include <chrono>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "data/token_file.h"
#include "kernels/base/random.h"
#include "paths.h"
#include "support/process.h"
#include "support/temp_folder.h"

namespace krait {

// A file's content; "" where there is none.
inline std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Whether the process prints `text`, waiting for up to a minute.
inline bool WaitFor(Process* process, const std::string& text) {
  for (int i = 0; i < 12000; ++i) {
    if (process->out().find(text) != std::string::npos) return true;
    if (!process->running()) return process->out().find(text) != std::string::npos;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

// Words of a small vocabulary in random order, cut into `documents` texts.
inline std::string WriteText(const TempFolder& folder, const std::string& name, int documents,
                             uint64_t seed) {
  const char* kWords[] = {"krait ", "scan ", "state ", "expert ", "norm ", "gate ", "\n", "of "};
  const RandomStream random(seed, RandomPurpose::kSynthetic, 0);
  uint64_t index = 0;
  for (int d = 0; d < documents; ++d) {
    std::string text;
    const int words = 20 + static_cast<int>(random.Bits(index++)[0] % 100);
    for (int w = 0; w < words; ++w) text += kWords[random.Bits(index++)[0] % 8];
    folder.Write(name + "/" + std::to_string(d) + ".txt", text);
  }
  BuildOptions options;
  options.out = folder / (name + ".h5");
  options.paths = {folder / name};
  options.force = true;
  const auto built = BuildTokenFile(options);
  KRAIT_CHECK(built.ok());
  return options.out;
}

// Attention, Mamba, dense and MoE layers; documents shorter and longer than a sequence.
inline std::string TinyConfig(const TempFolder& folder) {
  return "run_dir: " + folder.path() +
         "/run\n"
         "model:\n"
         "  vocab_size: 256\n"
         "  d_model: 16\n"
         "  n_layers: 4\n"
         "  mixer: {ratio: \"1:3\", offset: 1}\n"
         "  attention: {heads: 4, kv_heads: 2}\n"
         "  mamba: {d_state: 4}\n"
         "  mlp: {d_ff: 24}\n"
         "  moe: {every: 2, experts: 3, top_k: 2}\n"
         "data:\n"
         "  train: [{path: " +
         (folder / "train.h5") + ", weight: 3}, {path: " + (folder / "more.h5") +
         "}]\n"
         "  validation: [{path: " +
         (folder / "more.h5") +
         "}]\n"
         "  seq_len: 32\n"
         "train: {steps: 200, batch_tokens: 128, micro_batch: 2, seed: 7}\n"
         "optimizer: {lr: 1e-2}\n"
         "schedule: {warmup_steps: 10}\n"
         "checkpoint: {every: 10}\n"
         "log: {every: 5}\n"
         "evaluation: {every: 40, tokens: 512}\n";
}

// The folder of one test, with token files train.h5 and more.h5 and the config tiny.yaml.
class TinyRun {
 public:
  TinyRun() {
    WriteText(folder_, "train", 40, 1);
    WriteText(folder_, "more", 15, 2);
    config_ = folder_.Write("tiny.yaml", TinyConfig(folder_));
  }
  const TempFolder& folder() const { return folder_; }
  const std::string& config() const { return config_; }
  std::string operator/(const std::string& name) const { return folder_ / name; }

  // krait WORDS...; two threads that sleep while they wait, as tests share the machine.
  static std::vector<std::string> Argv(const std::vector<std::string>& words) {
    std::vector<std::string> argv = {KRAIT_BINARY};
    argv.insert(argv.end(), words.begin(), words.end());
    return argv;
  }
  static std::map<std::string, std::string> Variables() {
    return {{"OMP_NUM_THREADS", "2"}, {"OMP_WAIT_POLICY", "passive"}};
  }
  static ProcessResult Krait(const std::vector<std::string>& words) {
    return RunProcess(Argv(words), Variables());
  }
  // krait train tiny.yaml run_dir=NAME WORDS...
  std::vector<std::string> TrainWords(const std::string& run,
                                      const std::vector<std::string>& words = {}) const {
    std::vector<std::string> all = {"train", config_, "run_dir=" + (folder_ / run)};
    all.insert(all.end(), words.begin(), words.end());
    return all;
  }
  ProcessResult Train(const std::string& run, const std::vector<std::string>& words = {}) const {
    return Krait(TrainWords(run, words));
  }

 private:
  TempFolder folder_;
  std::string config_;
};

}  // namespace krait

#endif  // KRAIT_TESTS_SUPPORT_TINY_RUN_H_
