#include "kernels/cpu/blas.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "kernels/base/parallel_for.h"

namespace krait::cpu {
namespace {

// What OpenBLAS maps: the library with those that it needs, a buffer for the caller and for each
// thread, and the stacks of the threads. Nothing of it is touched before it is used.
int64_t AddressSpace() {
  constexpr int64_t kLibraries = int64_t{64} << 20, kBuffer = int64_t{128} << 20;
  constexpr int64_t kStack = int64_t{16} << 20;
  return kLibraries + kBuffer + MaxThreads() * (kBuffer + kStack);
}

bool Limited(__rlimit_resource_t resource) {
  rlimit limit = {};
  return getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
}

absl::Status CheckAddressSpace() {
  if (!Limited(RLIMIT_AS) && !Limited(RLIMIT_DATA)) return absl::OkStatus();
  const int64_t bytes = AddressSpace();
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory != MAP_FAILED) {
    munmap(memory, static_cast<size_t>(bytes));
    return absl::OkStatus();
  }
  return Error(ExitCode::kOutOfMemory,
               absl::StrFormat("the address space of this process is limited (ulimit -v), and less "
                               "than the %s are left that OpenBLAS takes for %d threads: raise the "
                               "limit, or set OMP_NUM_THREADS lower",
                               PrintBytes(bytes), MaxThreads()));
}

// A product on all threads, so that their buffers are there before the rest of the space is used.
void TakeBuffers(const Blas& blas) {
  constexpr int kSize = 256;
  const std::vector<float> zeros(static_cast<size_t>(kSize) * kSize);
  std::vector<float> product(zeros.size());
  blas.sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, kSize, kSize, kSize, 1, zeros.data(), kSize,
             zeros.data(), kSize, 0, product.data(), kSize);
}

absl::StatusOr<Blas> Load() {
  KRAIT_RETURN_IF_ERROR(CheckAddressSpace());
#ifdef KRAIT_OPENBLAS
  // Where the build found it, else where the system's loader does.
  void* library = nullptr;
  for (const char* name : {KRAIT_OPENBLAS, "libopenblas.so.0"}) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
  }
  if (library == nullptr) {
    return Error(ExitCode::kConfig, absl::StrFormat("OpenBLAS, for matrix products on the CPU, "
                                                    "cannot be loaded: %s",
                                                    dlerror()));
  }
  const auto sgemm = reinterpret_cast<decltype(&cblas_sgemm)>(dlsym(library, "cblas_sgemm"));
  const auto dgemm = reinterpret_cast<decltype(&cblas_dgemm)>(dlsym(library, "cblas_dgemm"));
  const auto core =
      reinterpret_cast<decltype(&openblas_get_corename)>(dlsym(library, "openblas_get_corename"));
  if (sgemm == nullptr || dgemm == nullptr || core == nullptr) {
    return Error(ExitCode::kConfig, "the OpenBLAS that was found lacks functions of OpenBLAS");
  }
  const Blas loaded = {sgemm, dgemm, core()};
#else
  const Blas loaded = {&cblas_sgemm, &cblas_dgemm, openblas_get_corename()};
#endif
  TakeBuffers(loaded);
  return loaded;
}

}  // namespace

absl::StatusOr<Blas> LoadBlas() {
  static const absl::StatusOr<Blas> loaded = Load();
  return loaded;
}

}  // namespace krait::cpu
