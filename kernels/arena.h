// Planned memory: a named segment of fixed size from which tensors are taken in stack order.
//
// The plan of a run is a run without arithmetic: the same model code executes with
// Context::planning set and measuring arenas, whose tensors have addresses but no memory; every op
// returns at once, and each arena's high-water mark is the size to reserve. So the plan cannot
// drift from the code, and a step allocates nothing. Not thread-safe.
#ifndef KRAIT_KERNELS_ARENA_H_
#define KRAIT_KERNELS_ARENA_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels/tensor.h"

namespace krait {

class Arena {
 public:
  // A measuring arena: unlimited, its tensors must not be read or written.
  explicit Arena(std::string name, Device device = Device::kCpu);
  // An arena of `bytes`, allocated now and zero-filled lazily by the system. Fatal with
  // kOutOfMemory, naming the segment and its size, when the memory cannot be had.
  Arena(std::string name, Device device, int64_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A contiguous uninitialised tensor aligned to 256 bytes. Fatal when the segment is too small
  // (the plan was wrong).
  Tensor Alloc(DType dtype, std::initializer_list<int64_t> shape);

  // Stack discipline: everything taken after mark() is given back by Release(mark).
  int64_t mark() const { return used_; }
  void Release(int64_t mark);

  int64_t high_water() const { return high_water_; }
  int64_t capacity() const { return capacity_; }  // -1: measuring
  void* base() const { return base_; }            // where the segment begins
  const std::string& name() const { return name_; }
  // Of a measuring arena: what has been taken and given back so far. Arenas with equal ones have
  // equal tensors at equal places.
  uint64_t signature() const { return signature_; }

 private:
  void Note(int64_t event);

  std::string name_;
  Device device_;
  char* base_ = nullptr;
  int64_t capacity_ = -1;
  int64_t used_ = 0;
  int64_t high_water_ = 0;
  uint64_t signature_ = 0;
};

// Gives back what was taken from the arena within a scope.
class ArenaScope {
 public:
  explicit ArenaScope(Arena* arena) : arena_(arena), mark_(arena->mark()) {}
  ~ArenaScope() { arena_->Release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena* arena_;
  int64_t mark_;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_ARENA_H_
