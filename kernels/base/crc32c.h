// CRC-32C (Castagnoli, polynomial 0x1EDC6F41, reflected, as in iSCSI RFC 3720).
#ifndef KRAIT_KERNELS_BASE_CRC32C_H_
#define KRAIT_KERNELS_BASE_CRC32C_H_

#include <cstddef>
#include <cstdint>

namespace krait {

// The CRC of `size` bytes appended to data whose CRC is `crc` (0 for none). Thread-safe. Uses the
// SSE4.2 instruction where the processor has it.
uint32_t Crc32c(const void* data, size_t size, uint32_t crc = 0);

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_CRC32C_H_
