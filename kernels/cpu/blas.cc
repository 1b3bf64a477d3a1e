#include "kernels/cpu/blas.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "kernels/base/parallel_for.h"

namespace krait::cpu {
namespace {

bool Limited(__rlimit_resource_t resource) {
  rlimit limit = {};
  return getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
}

// Whether the process may not have all the address space that it asks for.
bool Limited() { return Limited(RLIMIT_AS) || Limited(RLIMIT_DATA); }

// What OpenBLAS maps: the library with those that it needs, the stacks of the threads, and buffers:
// one for each thread of a product, and one for each product, of which every thread may run one.
int64_t AddressSpace() {
  constexpr int64_t kLibraries = int64_t{64} << 20, kBuffer = int64_t{128} << 20;
  constexpr int64_t kStack = int64_t{16} << 20;
  return kLibraries + kBuffer + MaxThreads() * (2 * kBuffer + kStack);
}

absl::Status CheckAddressSpace() {
  if (!Limited()) return absl::OkStatus();
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

// OpenBLAS's own functions for its buffers, which are not in its headers.
using TakeBuffer = void* (*)(int);
using GiveBackBuffer = void (*)(void*);

// Has the buffers mapped before the rest of the space is used: later on OpenBLAS would wait for
// them for ever.
void TakeBuffers(const Blas& blas, TakeBuffer take, GiveBackBuffer give_back) {
  constexpr int kSize = 256;
  const std::vector<float> zeros(static_cast<size_t>(kSize) * kSize);
  std::vector<float> product(zeros.size());
  blas.sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, kSize, kSize, kSize, 1, zeros.data(), kSize,
             zeros.data(), kSize, 0, product.data(), kSize);
  if (take == nullptr || give_back == nullptr) return;
  std::vector<void*> buffers;
  for (int i = 0; i < MaxThreads(); ++i) buffers.push_back(take(0));
  for (void* buffer : buffers) give_back(buffer);
}

#ifndef KRAIT_OPENBLAS
extern "C" {
[[gnu::weak]] void* blas_memory_alloc(int);
[[gnu::weak]] void blas_memory_free(void*);
}

// A static OpenBLAS takes its buffers before main, and would wait there for ever: looked for before
// that, for commands that multiply nothing too.
[[gnu::constructor(101)]] void EndWithoutAddressSpace() {
  const absl::Status status = CheckAddressSpace();
  if (status.ok()) return;
  const std::string line = "krait: " + MessageOf(status) + "\n";
  (void)!write(STDERR_FILENO, line.data(), line.size());
  _exit(static_cast<int>(ExitCodeOf(status)));
}
#endif

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
  if (Limited()) {
    TakeBuffers(loaded, reinterpret_cast<TakeBuffer>(dlsym(library, "blas_memory_alloc")),
                reinterpret_cast<GiveBackBuffer>(dlsym(library, "blas_memory_free")));
  }
  return loaded;
#else
  const Blas linked = {&cblas_sgemm, &cblas_dgemm, openblas_get_corename()};
  if (Limited()) TakeBuffers(linked, &blas_memory_alloc, &blas_memory_free);
  return linked;
#endif
}

}  // namespace

absl::StatusOr<Blas> LoadBlas() {
  static const absl::StatusOr<Blas> loaded = Load();
  return loaded;
}

}  // namespace krait::cpu
