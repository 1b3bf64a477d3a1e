// What computes on a device: readying it, and naming it.
#ifndef KRAIT_KERNELS_HARDWARE_H_
#define KRAIT_KERNELS_HARDWARE_H_

#include <string>

#include "kernels/base/status.h"
#include "kernels/placement.h"

namespace krait {

// Loads what ops on the device need, so that what is missing is an error of the start. kOutOfMemory
// when the process may not have the address space, kConfig for a missing library.
absl::Status PrepareDevice(Device device);

// What the bits of a result depend on besides the inputs: "CPU, 2 threads, Haswell, x86-64-v3" (the
// kernels that OpenBLAS chose, and Krait's own), or the GPU's name. After PrepareDevice.
std::string HardwareName(Device device);

}  // namespace krait

#endif  // KRAIT_KERNELS_HARDWARE_H_
