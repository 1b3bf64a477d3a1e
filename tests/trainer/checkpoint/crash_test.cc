// A save is killed, or fails, at its system calls (strace injection); afterwards a whole checkpoint
// of an expected step loads and the next save works. Tests named Long sweep every system call, the
// others a fixed sample.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

using testing_checkpoint::Holds;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

constexpr char kDriver[] = KRAIT_CRASH_DRIVER;

// Runs a program; its wait status, its standard error in `errors`.
int Execute(const std::vector<std::string>& command, std::string* errors) {
  int pipes[2];
  EXPECT_EQ(pipe2(pipes, O_CLOEXEC), 0);
  const pid_t child = fork();
  if (child == 0) {
    std::vector<char*> argv;
    for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    const int null = open("/dev/null", O_WRONLY);
    dup2(null, 1);
    dup2(pipes[1], 2);
    execvp(argv[0], argv.data());
    _exit(127);
  }
  close(pipes[1]);
  char buffer[4096];
  ssize_t got;
  while ((got = read(pipes[0], buffer, sizeof(buffer))) > 0) {
    errors->append(buffer, static_cast<size_t>(got));
  }
  close(pipes[0]);
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

std::vector<std::string> SaveCommand(const std::string& dir, int64_t step, int64_t generation = 0,
                                     int64_t scale = 1, int ranks = 1) {
  return {kDriver,
          dir,
          std::to_string(step),
          "2",
          std::to_string(generation),
          std::to_string(scale),
          std::to_string(ranks)};
}

void Save(const std::string& dir, int64_t step, int64_t generation = 0) {
  std::string errors;
  ASSERT_EQ(Execute(SaveCommand(dir, step, generation), &errors), 0) << errors;
}

// The content (step + 1000 * generation) of the newest whole checkpoint, 0 when there is none, -1
// when checkpoints exist but none is whole, -2 for content of no single save.
int64_t NewestContent(const std::string& dir, int64_t scale = 1) {
  const auto folders = ListCheckpoints(dir);
  if (!folders.ok()) return -1;
  if (folders->empty()) return 0;
  State state = SmallState(scale);
  std::vector<PassedOver> passed;
  const auto loaded = LoadNewestWhole(
      *folders, [&](const Checkpoint& c) { return LoadBoxes(c, state.boxes); }, &passed);
  if (!loaded.ok()) return -1;
  return Holds(loaded->meta.adam_steps, state) ? loaded->meta.adam_steps : -2;
}

int64_t WholeCheckpoints(const std::string& dir) {
  int64_t whole = 0;
  const std::vector<std::string> folders = *ListCheckpoints(dir);
  for (const std::string& folder : folders) {
    const auto checkpoint = OpenCheckpoint(folder);
    if (checkpoint.ok() && VerifyCheckpoint(*checkpoint).ok()) ++whole;
  }
  return whole;
}

// A folder with some history, one more save, and what may be newest when that save is cut short.
struct Scenario {
  const char* name;
  std::vector<std::pair<int64_t, int64_t>> before;  // step, generation
  std::vector<std::string> leftovers;               // folders of killed saves
  int64_t step, generation;
  std::set<int64_t> cut_short;  // contents
  int64_t completed;
  int64_t at_least;  // whole checkpoints, whatever happens
  int ranks = 1;     // that save

  std::vector<std::string> Command(const std::string& dir) const {
    return SaveCommand(dir, step, generation, 1, ranks);
  }
};
const std::vector<Scenario>& Scenarios() {
  const std::string id(32, '0');
  static const std::vector<Scenario> scenarios = {
      {"the first save", {}, {}, 1, 0, {0, 1}, 1, 0},
      {"a save that prunes", {{1, 0}, {2, 0}}, {}, 3, 0, {2, 3}, 3, 2},
      {"a save of a step that exists", {{1, 0}, {5, 0}}, {}, 5, 1, {5, 1005}, 1005, 2},
      {"a save that replaces the only one", {{5, 0}}, {}, 5, 1, {5, 1005}, 1005, 1},
      {"a save after killed ones",
       {{1, 0}, {2, 0}},
       {"step-00000003." + id + ".tmp/sub", "trash-step-00000001." + id + "/sub",
        "old-step-00000002." + id + "/sub"},
       3,
       0,
       {2, 3},
       3,
       2},
      {"a save of three ranks",
       {{1, 0}, {2, 0}},
       {"step-00000003." + id + ".tmp/rank-00002.h5"},
       3,
       0,
       {2, 3},
       3,
       2,
       3},
      {"a save of two ranks over one of a single rank", {{5, 0}}, {}, 5, 1, {5, 1005}, 1005, 1, 2},
  };
  return scenarios;
}

// One system call of a save: the ordinal counts calls of that name from the program's start.
struct Point {
  const Scenario* scenario;
  std::string call;
  int ordinal;
};

class CrashTest : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef KRAIT_SANITIZE
    GTEST_SKIP() << "sanitizers cannot work under strace";
#endif
    std::string errors;
    if (const int status = Execute({"strace", "-o", "/dev/null", "true"}, &errors); status != 0) {
      GTEST_SKIP() << "strace is missing or may not trace (apt install strace): " << errors;
    }
    // What survives a kill does not depend on the disk.
    root_ = testing_checkpoint::TempFolder("krait_crash_test");
    std::filesystem::remove_all(root_);
    std::filesystem::create_directories(root_);
    dir_ = root_ + "/checkpoints";
  }
  void TearDown() override {
    if (!root_.empty()) std::filesystem::remove_all(root_);
  }

  void Prepare(const Scenario& scenario) {
    std::filesystem::remove_all(dir_);
    if (!std::filesystem::exists(root_ + "/" + scenario.name)) {
      for (const auto& [step, generation] : scenario.before) Save(dir_, step, generation);
      std::filesystem::create_directories(dir_);
      for (const std::string& name : scenario.leftovers) {
        std::filesystem::create_directories(dir_ + "/" + name);
      }
      std::filesystem::rename(dir_, root_ + "/" + scenario.name);
    }
    std::filesystem::copy(root_ + "/" + scenario.name, dir_,
                          std::filesystem::copy_options::recursive);
  }

  // All system calls between the driver's "begin" and "end" of each scenario.
  std::vector<Point> AllPoints() {
    std::vector<Point> points;
    for (const Scenario& scenario : Scenarios()) {
      Prepare(scenario);
      const std::string log = root_ + "/trace";
      std::vector<std::string> command = {"strace", "-o", log};
      for (const auto& word : scenario.Command(dir_)) command.push_back(word);
      std::string errors;
      EXPECT_EQ(Execute(command, &errors), 0) << errors;
      std::map<std::string, int> count;
      bool inside = false;
      std::ifstream lines(log);
      for (std::string line; std::getline(lines, line);) {
        const std::string call = line.substr(0, line.find('('));
        if (call.find_first_not_of("abcdefghijklmnopqrstuvwxyz_0123456789") != std::string::npos) {
          continue;  // "+++ exited with 0 +++"
        }
        ++count[call];
        if (line.find("\"end\\n\"") != std::string::npos) inside = false;
        if (inside) points.push_back({&scenario, call, count[call]});
        if (line.find("\"begin\\n\"") != std::string::npos) inside = true;
      }
    }
    return points;
  }

  // Runs the scenario's save with something injected at the point; the wait status.
  int Inject(const Point& point, const std::string& what, std::string* errors) {
    Prepare(*point.scenario);
    std::vector<std::string> command = {
        "strace",
        "-o",
        "/dev/null",
        "-e",
        "trace=" + point.call,
        "-e",
        "inject=" + point.call + ":" + what + ":when=" + std::to_string(point.ordinal)};
    for (const auto& word : point.scenario->Command(dir_)) command.push_back(word);
    return Execute(command, errors);
  }

  // The folder after an interrupted save, then a further save over it.
  void CheckAfter(const Scenario& scenario) {
    EXPECT_TRUE(scenario.cut_short.contains(NewestContent(dir_)))
        << "newest content is " << NewestContent(dir_);
    EXPECT_GE(WholeCheckpoints(dir_), scenario.at_least);
    Save(dir_, 9);
    EXPECT_EQ(NewestContent(dir_), 9);
    EXPECT_GE(WholeCheckpoints(dir_), std::min<int64_t>(2, scenario.at_least + 1));
    // Nothing is left behind but checkpoints, one moved aside by a cut-short replacement included.
    const std::vector<std::string> names = *ListDirectory(dir_, ExitCode::kData);
    const std::vector<std::string> folders = *ListCheckpoints(dir_);
    for (const std::string& name : names) {
      EXPECT_TRUE(name == "latest" || std::count(folders.begin(), folders.end(), dir_ + "/" + name))
          << "left behind: " << name;
    }
  }

  void Kill(const Point& point) {
    SCOPED_TRACE(std::string(point.scenario->name) + ": killed at " + point.call + " " +
                 std::to_string(point.ordinal));
    std::string errors;
    const int status = Inject(point, "signal=SIGKILL", &errors);
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status << " " << errors;
    CheckAfter(*point.scenario);
  }

  // Returns whether the save reported the error.
  bool Fail(const Point& point, const std::string& error) {
    SCOPED_TRACE(std::string(point.scenario->name) + ": " + error + " at " + point.call + " " +
                 std::to_string(point.ordinal));
    std::string errors;
    const int status = Inject(point, "error=" + error, &errors);
    EXPECT_TRUE(WIFEXITED(status)) << "died of signal " << WTERMSIG(status);
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    EXPECT_TRUE(code == 0 || code == 31) << "exit " << code << ": " << errors;
    if (code == 0) {
      EXPECT_EQ(NewestContent(dir_), point.scenario->completed);
    } else {
      EXPECT_NE(errors.find("cannot save " + dir_), std::string::npos) << errors;
    }
    CheckAfter(*point.scenario);
    return code == 31;
  }

  std::string root_, dir_;
};

// Calls about memory, and writes to a pipe of the driver itself: no disk makes these fail.
bool DiskCanFail(const Point& point) {
  static const std::set<std::string> never = {
      "brk",          "mmap",           "munmap", "mremap", "mprotect", "madvise",    "futex",
      "rt_sigaction", "rt_sigprocmask", "getpid", "gettid", "getuid",   "sched_yield"};
  return !never.contains(point.call);
}

std::vector<Point> Sample(std::vector<Point> points, size_t count) {
  std::mt19937 random(20260214);
  std::vector<Point> out;
  for (size_t i = 0; i < count && !points.empty(); ++i) {
    const size_t k = random() % points.size();
    out.push_back(points[k]);
    points.erase(points.begin() + static_cast<std::ptrdiff_t>(k));
  }
  return out;
}

TEST_F(CrashTest, KilledAtASampleOfSystemCalls) {
  const std::vector<Point> points = AllPoints();
  ASSERT_GT(points.size(), 200u);
  for (const Point& point : Sample(points, 25)) Kill(point);
}

TEST_F(CrashTest, FailingAtASampleOfSystemCalls) {
  std::vector<Point> points = AllPoints();
  std::erase_if(points, [](const Point& p) { return !DiskCanFail(p); });
  int reported = 0;
  for (const Point& point : Sample(points, 6)) {
    reported += Fail(point, "ENOSPC");
    reported += Fail(point, "EIO");
  }
  EXPECT_GT(reported, 0);
}

TEST_F(CrashTest, LongKilledAtEverySystemCall) {
  const std::vector<Point> points = AllPoints();
  for (const Point& point : points) Kill(point);
  std::printf("killed at each of %zu system calls of %zu saves\n", points.size(),
              Scenarios().size());
}

TEST_F(CrashTest, LongFailingAtEverySystemCall) {
  std::vector<Point> points = AllPoints();
  std::erase_if(points, [](const Point& p) { return !DiskCanFail(p); });
  int reported = 0;
  for (const Point& point : points) {
    reported += Fail(point, "ENOSPC");
    reported += Fail(point, "EIO");
  }
  std::printf(
      "ENOSPC and EIO at each of %zu system calls: %d saves failed with exit 31, %zu "
      "completed\n",
      points.size(), reported, 2 * points.size() - static_cast<size_t>(reported));
}

TEST_F(CrashTest, InterruptedCallsAreTakenUpAgain) {
  std::vector<Point> points = AllPoints();
  std::erase_if(points, [](const Point& p) {
    return p.call != "pwrite64" && p.call != "pread64" && p.call != "fallocate" &&
           p.call != "getrandom";
  });
  for (const Point& point : Sample(points, 10)) EXPECT_FALSE(Fail(point, "EINTR"));
}

// fsync(every shard) < fsync(manifest) < fsync(folder) < rename < fsync(parent) < rename of latest.
TEST_F(CrashTest, TheOrderOfDurability) {
  Prepare(Scenarios()[1]);
  const std::string log = root_ + "/trace";
  std::vector<std::string> command = {"strace", "-y", "-o", log, "-e", "trace=fsync,rename"};
  for (const auto& word : SaveCommand(dir_, 3, 0, 1, /*ranks=*/3)) command.push_back(word);
  std::string errors;
  ASSERT_EQ(Execute(command, &errors), 0) << errors;
  std::vector<std::string> order;
  std::ifstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    const auto has = [&](const char* text) { return line.find(text) != std::string::npos; };
    if (line.starts_with("fsync")) {
      order.push_back(has(".h5>")                    ? "fsync shard"
                      : has("manifest.json>")        ? "fsync manifest"
                      : has(".tmp>") && has("step-") ? "fsync folder"
                      : has("latest.tmp>")           ? "fsync latest"
                      : has("checkpoints>")          ? "fsync parent"
                                                     : line);
    } else if (line.starts_with("rename")) {
      order.push_back(has("/latest\"") ? "rename latest"
                      : has("/trash-") ? "rename trash"
                                       : "rename step");
    }
  }
  EXPECT_THAT(order,
              ::testing::ElementsAre("fsync shard", "fsync shard", "fsync shard", "fsync manifest",
                                     "fsync folder", "rename step", "fsync parent", "fsync latest",
                                     "rename latest", "fsync parent", "rename trash"));
}

// 8 MiB of memory as a file system of this process alone; without root, in a user namespace where
// this user is root. False where that is not permitted.
bool MountSmallDisk(const std::string& path) {
  const std::string uid = std::to_string(geteuid()), gid = std::to_string(getegid());
  if (geteuid() == 0) {
    if (unshare(CLONE_NEWNS) != 0) return false;
  } else {
    if (unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0) return false;
    std::ofstream("/proc/self/setgroups") << "deny";
    std::ofstream("/proc/self/uid_map") << "0 " + uid + " 1";
    std::ofstream("/proc/self/gid_map") << "0 " + gid + " 1";
  }
  return mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         mount("krait", path.c_str(), "tmpfs", 0, "size=8m") == 0;
}

// A small file system in memory, really full. In a child with mounts of its own; what is wrong
// comes back as text.
TEST(FullDiskTest, SavesFailOrCompleteAndReadOnlyIsRefused) {
  const std::string mount_point =
      ::testing::TempDir() + "krait_full_disk_" + std::to_string(getpid());
  std::filesystem::create_directories(mount_point);
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  const pid_t child = fork();
  if (child == 0) {
    std::string wrong;
    if (!MountSmallDisk(mount_point)) _exit(77);
    const std::string dir = mount_point + "/checkpoints";
    constexpr int64_t kScale = 300;  // about 0.3 MiB
    int failed = 0, completed = 0;
    for (int64_t step = 1; step <= 2; ++step) {
      std::string errors;
      if (Execute(SaveCommand(dir, step, 0, kScale), &errors) != 0) wrong += errors;
    }
    for (int level = 0; level <= 20; ++level) {
      // Leaves between nothing and twice what a save takes.
      std::filesystem::remove(mount_point + "/filler");
      const auto space = std::filesystem::space(mount_point);
      const uintmax_t leave = static_cast<uintmax_t>(level) * 40000;
      std::ofstream(mount_point + "/filler") << std::string(space.available - leave, 'x');
      const int64_t before = NewestContent(dir, kScale);
      std::string errors;
      const int status = Execute(SaveCommand(dir, before + 1, 0, kScale), &errors);
      const int64_t after = NewestContent(dir, kScale);
      const std::string place = "\nlevel " + std::to_string(level) + ": ";
      if (!WIFEXITED(status)) {
        wrong += place + "died of a signal";
      } else if (WEXITSTATUS(status) == 0) {
        ++completed;
        if (after != before + 1) wrong += place + "completed but does not load";
      } else {
        ++failed;
        if (WEXITSTATUS(status) != 31) wrong += place + "exit " + errors;
        if (after != before) wrong += place + "the previous checkpoint does not load";
        if (errors.find("bytes needed") == std::string::npos) wrong += place + errors;
      }
      if (WholeCheckpoints(dir) < 2) wrong += place + "fewer than two whole checkpoints";
    }
    // Read-only, as after an error of the disk.
    const int64_t last = NewestContent(dir, kScale);
    if (mount(nullptr, mount_point.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) == 0) {
      std::string errors;
      const int status = Execute(SaveCommand(dir, last + 1, 0, kScale), &errors);
      if (!WIFEXITED(status) || WEXITSTATUS(status) != 31 ||
          errors.find("Read-only file system") == std::string::npos) {
        wrong += "\nread-only: " + errors;
      }
      if (NewestContent(dir, kScale) != last) wrong += "\nread-only: does not load";
    } else {
      wrong += "\ncannot make the file system read-only";
    }
    if (failed < 5 || completed < 5) {
      wrong += "\n" + std::to_string(failed) + " failed, " + std::to_string(completed) +
               " completed: not both tried";
    }
    if (write(pipes[1], wrong.data(), wrong.size()) < 0) _exit(1);
    _exit(wrong.empty() ? 0 : 1);
  }
  close(pipes[1]);
  std::string wrong;
  char buffer[4096];
  ssize_t got;
  while ((got = read(pipes[0], buffer, sizeof(buffer))) > 0) {
    wrong.append(buffer, static_cast<size_t>(got));
  }
  close(pipes[0]);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  std::filesystem::remove_all(mount_point);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
    GTEST_SKIP() << "may not mount a file system here";
  }
  EXPECT_EQ(status, 0) << wrong;
}

}  // namespace
}  // namespace krait
