#include "trainer/tools/doctor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "nlohmann/json.hpp"
#include "paths.h"
#include "support/process.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The command, after what a shell does first.
ProcessResult Doctor(const std::string& before, const std::string& options = "") {
  return RunProcess({"/bin/sh", "-c", before + "; exec " KRAIT_BINARY " doctor " + options},
                    {{"OPENBLAS_CORETYPE", "Haswell"}});
}

TEST(DoctorTest, VersionsAreFound) {
  EXPECT_EQ(VersionIn("mpirun (Open MPI) 4.1.4"), "4.1.4");
  EXPECT_EQ(VersionIn("Open MPI v5.0.10rc1"), "5.0.10");
  EXPECT_EQ(
      VersionIn("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release"),
      "580.95.05");
  EXPECT_EQ(VersionIn("mpirun 4"), "");
  EXPECT_EQ(VersionIn(""), "");
}

TEST(DoctorTest, EachFindingHasItsCure) {
  const std::vector<Finding> findings = {{"a", Health::kOk, "fine", ""},
                                         {"b", Health::kWarning, "so so", "do this"},
                                         {"c", Health::kFailure, "broken", "do that"}};
  EXPECT_TRUE(AnyFailure(findings));
  EXPECT_FALSE(AnyFailure({findings[0], findings[1]}));
  EXPECT_EQ(DoctorText(findings),
            "ok       a          fine\n"
            "warning  b          so so\n"
            "                    cure: do this\n"
            "failure  c          broken\n"
            "                    cure: do that\n"
            "1 failure, 1 warning\n");
  const auto json = nlohmann::json::parse(DoctorJson(findings));
  EXPECT_EQ(json["failures"], 1);
  EXPECT_EQ(json["findings"][2]["cure"], "do that");
  EXPECT_FALSE(json["findings"][0].contains("cure"));
}

TEST(DoctorTest, ThisMachineIsExaminedInAFewSeconds) {
  const TempFolder folder;
  const ProcessResult result = Doctor("cd " + folder.path(), "--json");
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(result.code, json["failures"] == 0 ? 0 : 1) << result.out;
  std::string subjects;
  for (const auto& finding : json["findings"]) {
    subjects += finding["subject"].get<std::string>() + " ";
    EXPECT_EQ(finding["health"] != "ok", finding.contains("cure")) << finding;
  }
  EXPECT_EQ(subjects, "krait gpu processor affinity mpi mpirun limits memory shm disk clock ");
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

#ifndef KRAIT_SANITIZE  // it reserves terabytes of address space

TEST(DoctorTest, AShellThatIsShortOfThingsIsWarned) {
  if (cuda::Available()) GTEST_SKIP() << "with a GPU an address space limit is a failure";
  const TempFolder folder;
  const ProcessResult result =
      Doctor("cd " + folder.path() +
             " && ulimit -n 256 && ulimit -v 16000000 && ulimit -f 4000000 && export PATH=/none "
             "OMP_NUM_THREADS=1");
  EXPECT_EQ(result.code, 0) << result.out;
  EXPECT_THAT(result.out, AllOf(HasSubstr("warning  limits     open files: 256"),
                                HasSubstr("warning  limits     address space: 15.3 GiB"),
                                HasSubstr("warning  limits     size of a file: "),
                                HasSubstr("warning  mpirun     there is none in PATH")));
  EXPECT_THAT(Doctor("cd " + folder.path() + " && export OMP_NUM_THREADS=4096").out,
              AllOf(HasSubstr("warning  affinity"), HasSubstr("cure: more threads than cores")));
  if (sysconf(_SC_NPROCESSORS_ONLN) > 1) {
    EXPECT_THAT(Doctor("cd " + folder.path() + " && taskset -p 1 $$ > /dev/null").out,
                AllOf(HasSubstr("warning  affinity   1 of "), HasSubstr("--bind-to none")));
  }
}

#endif

TEST(DoctorTest, WhatWouldFailIsAFailure) {
  ProcessResult result = Doctor("cd /proc");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, HasSubstr("failure  disk"));
  const TempFolder folder;
  const std::string mpirun = folder.Write("mpirun", "#!/bin/sh\necho 'HYDRA build details:'\n");
  ASSERT_EQ(chmod(mpirun.c_str(), 0755), 0);
  result = Doctor("cd " + folder.path() + " && export PATH=" + folder.path() + ":$PATH");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, AllOf(HasSubstr("failure  mpirun"), HasSubstr("a rank 0 of its own")));
  folder.Write("mpirun", "#!/bin/sh\necho 'mpirun (Open MPI) 1.10.2'\n");
  result = Doctor("cd " + folder.path() + " && export PATH=" + folder.path() + ":$PATH");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, HasSubstr("1.10.2, but krait uses Open MPI v"));
}

}  // namespace
}  // namespace krait
