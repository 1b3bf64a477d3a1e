#include "trainer/ablate/sweep_run.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <list>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "kernels/base/clock.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "kernels/base/stop_signals.h"
#include "kernels/cuda/runtime.h"
#include "trainer/ablate/child.h"
#include "trainer/ablate/weights_only.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/report/environment.h"
#include "trainer/report/metrics.h"
#include "trainer/report/run_summary.h"

namespace krait {
namespace {

constexpr int64_t kMaxLogBytes = int64_t{256} << 20;
constexpr int64_t kMaxSpeedBytes = 16 << 20;
constexpr useconds_t kPollMicroseconds = 50'000;
constexpr double kLockSeconds = 120;  // for a run of a killed ablate to save and stop

// "krait: ..." lines are errors; the last one is the reason.
std::string LastError(const std::string& log) {
  const auto text = ReadFile(log, kMaxLogBytes, ExitCode::kCannotSave);
  std::string last;
  if (!text.ok()) return last;
  std::istringstream lines(*text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("krait: ") && !line.starts_with("krait: note: ")) last = line.substr(7);
  }
  return last;
}

// What a child process may be shown as CUDA_VISIBLE_DEVICES.
std::vector<std::string> VisibleGpus() {
  if (const char* visible = std::getenv("CUDA_VISIBLE_DEVICES"); visible != nullptr) {
    return absl::StrSplit(visible, ',', absl::SkipEmpty());
  }
  std::vector<std::string> gpus;
  for (int i = 0; i < cuda::DeviceCount(); ++i) gpus.push_back(std::to_string(i));
  return gpus;
}

class SweepRunner {
 public:
  SweepRunner(const Sweep& sweep, const SweepRunOptions& options)
      : sweep_(sweep),
        options_(options),
        signals_("asking the runs to save and stop; once more to end at once") {}

  absl::StatusOr<ExitCode> Run() {
    KRAIT_ASSIGN_OR_RETURN(program_, OwnProgram());
    KRAIT_ASSIGN_OR_RETURN(plan_, PlanSweep(sweep_, options_.ranks, ReadStepSeconds(sweep_.out)));
    for (const std::string& note : plan_.notes) KRAIT_RETURN_IF_ERROR(Say("note: " + note));
    KRAIT_RETURN_IF_ERROR(MakeSlots());
    KRAIT_ASSIGN_OR_RETURN(lock_, RunLock::Acquire(sweep_.out, "ablate.lock"));
    if (!plan_.solved()) {
      KRAIT_RETURN_IF_ERROR(MeasureSpeeds());
      KRAIT_ASSIGN_OR_RETURN(plan_, PlanSweep(sweep_, options_.ranks, ReadStepSeconds(sweep_.out)));
    }
    KRAIT_RETURN_IF_ERROR(
        WriteFileAtomic(sweep_.out + "/plan.json", SweepPlanJson(plan_), ExitCode::kCannotSave));
    KRAIT_RETURN_IF_ERROR(Queue());
    const absl::Status ended = Work();
    if (!ended.ok()) {  // this process cannot go on: the runs save and stop
      for (Running& running : running_) running.child.Signal(SIGUSR1);
      while (!running_.empty()) {
        usleep(kPollMicroseconds);
        std::erase_if(running_, [](Running& r) { return r.child.Poll().has_value(); });
      }
      return ended;
    }
    return Close();
  }

 private:
  struct Running {
    const PlannedRun* run;
    size_t slot;
    Child child;
    double begin;
  };

  absl::Status Say(const std::string& line) const { return options_.say(line); }
  std::string NameOf(const PlannedRun& run) const {
    return absl::StrCat(plan_.cells[run.cell].name,
                        sweep_.seeds.size() > 1 ? absl::StrCat(", seed ", run.seed) : "");
  }

  absl::Status MakeSlots() {
    const auto ranks = static_cast<size_t>(options_.ranks);
    const bool on_gpus = plan_.cells.front().config.train.device == DevicePreference::kCuda;
    // Without a GPU the device that all runs ask for is refused once, here.
    if (on_gpus && cuda::DeviceCount() == 0) return CheckDevice(plan_.cells.front().config);
    const std::vector<int> cores = OwnCores();
    const std::vector<std::string> gpus = on_gpus ? VisibleGpus() : std::vector<std::string>();
    const size_t units = on_gpus ? gpus.size() : cores.size();
    size_t jobs = static_cast<size_t>(options_.jobs);
    if (jobs == 0) {
      jobs = std::max<size_t>(1, units / ranks);
      if (!on_gpus) {
        int64_t most = 1;
        for (const PlannedCell& cell : plan_.cells) most = std::max(most, cell.memory_bytes);
        const int64_t fit = MachineMemory() / (most * options_.ranks);
        jobs = std::min(jobs, static_cast<size_t>(std::max<int64_t>(1, fit)));
      }
      jobs = std::min(jobs, plan_.runs.size());
    } else if (on_gpus && jobs * ranks > gpus.size()) {
      return Error(ExitCode::kConfig,
                   absl::StrFormat("--jobs %d of %d rank%s need %d GPUs, and there %s %d", jobs,
                                   ranks, ranks == 1 ? "" : "s", jobs * ranks,
                                   gpus.size() == 1 ? "is" : "are", gpus.size()));
    }
    slots_ = ShareOut(jobs, ranks, gpus, cores);
    free_.assign(slots_.size(), true);
    return absl::OkStatus();
  }

  ChildOptions Command(const RunSlot& slot, std::vector<std::string> words,
                       const std::string& log) const {
    ChildOptions child;
    if (options_.ranks > 1) {
      // A Slurm or another allocation is mpirun's to find. Ranks are bound to no core.
      child.words = {"mpirun", "-n", std::to_string(options_.ranks), "--bind-to", "none"};
      if (geteuid() == 0) child.words.push_back("--allow-run-as-root");
    }
    child.words.push_back(program_);
    for (std::string& word : words) child.words.push_back(std::move(word));
    size_t threads = std::max<size_t>(1, slot.cores.size() / static_cast<size_t>(options_.ranks));
    // A user's own smaller number stays.
    if (const char* own = std::getenv("OMP_NUM_THREADS"); own != nullptr) {
      const auto number = ParseInteger(own);
      if (number.has_value() && *number > 0) {
        threads = std::min(threads, static_cast<size_t>(*number));
      }
    }
    child.environment = {{"OMP_NUM_THREADS", std::to_string(threads)}};
    if (!slot.gpus.empty()) {
      child.environment.push_back({"CUDA_VISIBLE_DEVICES", absl::StrJoin(slot.gpus, ",")});
    }
    child.cores = slot.cores;
    child.log = log;
    child.holds_stop = options_.ranks == 1;  // mpirun would wait for it for ever
    return child;
  }

  // One after another, each with the share that its runs will have.
  absl::Status MeasureSpeeds() {
    StepSeconds speeds = ReadStepSeconds(sweep_.out);
    const std::string folder = sweep_.out + "/speed";
    KRAIT_RETURN_IF_ERROR(MakeDirectories(folder, ExitCode::kCannotSave));
    for (const PlannedCell& cell : plan_.cells) {
      if (speeds.contains(cell.speed_key)) continue;
      KRAIT_RETURN_IF_ERROR(Say("measuring the speed of " + cell.name));
      const std::string base = folder + "/" + cell.speed_key;
      RunConfig config = cell.config;
      config.run_dir = base;
      config.checkpoint.dir = base + "/checkpoints";
      KRAIT_RETURN_IF_ERROR(
          WriteFileAtomic(base + ".yaml", config.ToYaml(), ExitCode::kCannotSave));
      KRAIT_RETURN_IF_ERROR(RemoveFile(base + ".json", ExitCode::kCannotSave));
      Child child;
      KRAIT_ASSIGN_OR_RETURN(
          child, Child::Start(Command(slots_.front(),
                                      {"bench", "step", base + ".yaml", "--json", base + ".json"},
                                      base + ".log")));
      std::optional<int> code;
      while (!code.has_value()) {
        usleep(kPollMicroseconds);
        if (StopRequested()) child.Signal(SIGTERM);
        code = child.Poll();
      }
      if (StopRequested()) {
        return Error(ExitCode::kStopped,
                     "stopped on request while speeds were measured: the same "
                     "command goes on");
      }
      double ms = 0;
      if (*code == 0) {
        const auto text = ReadFile(base + ".json", kMaxSpeedBytes, ExitCode::kCannotSave);
        const auto json =
            nlohmann::json::parse(text.ok() ? *text : "", nullptr, /*allow_exceptions=*/false);
        if (json.is_object() && json.contains("step_ms") && json["step_ms"].is_number()) {
          ms = json["step_ms"].get<double>();
        }
      }
      if (ms <= 0) {
        return Error(ExitCode::kConfig,
                     absl::StrCat("the speed of ", cell.name, " could not be measured (exit ",
                                  *code, "; ", base, ".log): ", LastError(base + ".log")));
      }
      speeds[cell.speed_key] = ms / 1000;
      const nlohmann::json all(speeds);
      KRAIT_RETURN_IF_ERROR(
          WriteFileAtomic(sweep_.out + "/step_seconds.json", all.dump(2), ExitCode::kCannotSave));
    }
    return absl::OkStatus();
  }

  absl::Status Queue() {
    for (const PlannedRun& run : plan_.runs) {
      const auto summary = ReadRunSummary(run.dir);
      if (summary.has_value() && summary->finished) {
        ++finished_before_;
        // Of a run that ended just before this process was killed.
        KRAIT_RETURN_IF_ERROR(Tidy(run));
      } else {
        queue_.push_back(&run);
      }
    }
    return Say(absl::StrFormat(
        "%s: %d runs, %d finished before; %d at once, into %s", sweep_.path, plan_.runs.size(),
        finished_before_, std::min(slots_.size(), std::max<size_t>(1, queue_.size())), sweep_.out));
  }

  absl::Status Work() {
    while (!queue_.empty() || !running_.empty()) {
      const bool stop = StopRequested();
      if (stop && !asked_) {
        asked_ = true;
        for (const Running& running : running_) running.child.Signal(SIGUSR1);
      }
      if (stop && running_.empty()) break;
      for (size_t slot = 0; slot < slots_.size() && !stop && !queue_.empty(); ++slot) {
        if (!free_[slot]) continue;
        const PlannedRun* run = queue_.front();
        queue_.pop_front();
        KRAIT_RETURN_IF_ERROR(Start(*run, slot));
      }
      for (auto it = running_.begin(); it != running_.end();) {
        const auto code = it->child.Poll();
        if (!code.has_value()) {
          ++it;
          continue;
        }
        const Running ended = *it;
        it = running_.erase(it);
        free_[ended.slot] = true;
        KRAIT_RETURN_IF_ERROR(Ended(ended, *code));
      }
      usleep(kPollMicroseconds);
    }
    return absl::OkStatus();
  }

  // A run of an ablate that was killed may still be saving.
  absl::Status WaitForLock(const PlannedRun& run) const {
    const double begin = MonotonicSeconds();
    bool told = false;
    while (true) {
      const auto lock = RunLock::Acquire(run.dir);
      if (ExitCodeOf(lock.status()) != ExitCode::kConfig) return lock.status();
      if (StopRequested() || MonotonicSeconds() - begin > kLockSeconds) return lock.status();
      if (!told) KRAIT_RETURN_IF_ERROR(Say("waiting for " + MessageOf(lock.status())));
      told = true;
      usleep(kPollMicroseconds);
    }
  }

  absl::Status Start(const PlannedRun& run, size_t slot) {
    KRAIT_RETURN_IF_ERROR(MakeDirectories(run.dir, ExitCode::kCannotSave));
    const absl::Status locked = WaitForLock(run);
    if (ExitCodeOf(locked) == ExitCode::kConfig) {
      ++failed_;
      return Say(absl::StrCat("failed    ", NameOf(run), ": ", MessageOf(locked)));
    }
    KRAIT_RETURN_IF_ERROR(locked);
    const std::string config = run.dir + "/run.yaml";
    KRAIT_RETURN_IF_ERROR(WriteFileAtomic(config, run.yaml, ExitCode::kCannotSave));
    Child child;
    KRAIT_ASSIGN_OR_RETURN(
        child, Child::Start(Command(slots_[slot], {"train", config}, run.dir + "/output.log")));
    free_[slot] = false;
    running_.push_back({&run, slot, child, MonotonicSeconds()});
    ++started_;
    const std::vector<std::string>& gpus = slots_[slot].gpus;
    return Say(absl::StrFormat(
        "started   %s (%d of %d)%s", NameOf(run), finished_before_ + started_, plan_.runs.size(),
        gpus.empty() ? "" : absl::StrCat(" on GPU ", absl::StrJoin(gpus, ","))));
  }

  absl::Status Ended(const Running& ended, int code) {
    const PlannedRun& run = *ended.run;
    auto summary = ReadRunSummary(run.dir);
    if (code == static_cast<int>(ExitCode::kOk) && summary.has_value() && summary->finished) {
      ++finished_now_;
      KRAIT_RETURN_IF_ERROR(Tidy(run));
      const auto value = LastRecorded(run.dir, plan_.metric);
      return Say(absl::StrFormat(
          "finished  %s in %s%s%s", NameOf(run), FormatDuration(MonotonicSeconds() - ended.begin),
          value.has_value() ? absl::StrFormat(" | %s %.4f", plan_.metric, *value) : "", Left()));
    }
    if (code == static_cast<int>(ExitCode::kStopped)) {
      ++stopped_;
      return Say("stopped   " + NameOf(run));
    }
    ++failed_;
    // A run that died could not say so itself.
    if (!summary.has_value() || summary->exit_code != code || summary->error.empty()) {
      if (!summary.has_value()) summary.emplace();
      summary->finished = false;
      summary->exit_code = code;
      summary->error = code > 128 ? absl::StrCat("ended by signal ", code - 128)
                                  : LastError(run.dir + "/output.log");
      if (summary->error.empty()) summary->error = "it said nothing";
      KRAIT_RETURN_IF_ERROR(WriteRunSummary(run.dir, *summary));
    }
    return Say(absl::StrFormat("failed    %s (exit %d): %s", NameOf(run), code,
                               std::string(absl::StrReplaceAll(summary->error, {{"\n", "; "}}))));
  }

  // How long the rest takes, by the FLOPs so far.
  std::string Left() const {
    const size_t rest = plan_.runs.size() - finished_before_ - finished_now_;
    if (rest == 0) return "";
    return absl::StrFormat(" | %d to go", rest);
  }

  absl::Status Tidy(const PlannedRun& run) const {
    return KeepFinal(run.dir + "/checkpoints", options_.keep_moments);
  }

  absl::StatusOr<ExitCode> Close() {
    const size_t finished = finished_before_ + finished_now_;
    const bool stopped =
        stopped_ > 0 || (StopRequested() && finished + failed_ < plan_.runs.size());
    std::string line = absl::StrFormat("%d of %d runs are finished", finished, plan_.runs.size());
    if (failed_ > 0) absl::StrAppend(&line, ", ", failed_, " failed");
    if (finished < plan_.runs.size()) {
      absl::StrAppend(&line, ": the same command goes on with the others");
    }
    KRAIT_RETURN_IF_ERROR(Say(line));
    return stopped ? ExitCode::kStopped : failed_ > 0 ? ExitCode::kNo : ExitCode::kOk;
  }

  const Sweep& sweep_;
  const SweepRunOptions& options_;
  StopSignals signals_;
  std::string program_;
  SweepPlan plan_;
  RunLock lock_;
  std::vector<RunSlot> slots_;
  std::vector<bool> free_;
  std::deque<const PlannedRun*> queue_;
  std::list<Running> running_;
  bool asked_ = false;
  size_t finished_before_ = 0, finished_now_ = 0, started_ = 0, failed_ = 0, stopped_ = 0;
};

}  // namespace

std::vector<RunSlot> ShareOut(size_t jobs, size_t ranks, const std::vector<std::string>& gpus,
                              const std::vector<int>& cores) {
  std::vector<RunSlot> slots(jobs);
  for (size_t i = 0; i < jobs; ++i) {
    for (size_t g = i * ranks; g < (i + 1) * ranks && g < gpus.size(); ++g) {
      slots[i].gpus.push_back(gpus[g]);
    }
    const size_t begin = i * cores.size() / jobs;
    const size_t end = std::max(begin + 1, (i + 1) * cores.size() / jobs);
    for (size_t c = begin; c < std::min(end, cores.size()); ++c) slots[i].cores.push_back(cores[c]);
  }
  return slots;
}

StepSeconds ReadStepSeconds(const std::string& out) {
  StepSeconds speeds;
  const std::string path = out + "/step_seconds.json";
  if (!Exists(path)) return speeds;
  const auto text = ReadFile(path, kMaxSpeedBytes, ExitCode::kCannotSave);
  const auto json =
      nlohmann::json::parse(text.ok() ? *text : "", nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return speeds;
  for (const auto& [key, value] : json.items()) {
    if (value.is_number()) speeds[key] = value.get<double>();
  }
  return speeds;
}

absl::StatusOr<ExitCode> RunSweep(const Sweep& sweep, const SweepRunOptions& options) {
  return SweepRunner(sweep, options).Run();
}

}  // namespace krait
