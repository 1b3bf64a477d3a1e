// CRC-32C (Castagnoli, polynomial 0x1EDC6F41, reflected, as in iSCSI RFC 3720).
#ifndef KRAIT_KERNELS_BASE_CRC32C_H_
#define KRAIT_KERNELS_BASE_CRC32C_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace krait {

// The CRC of `size` bytes appended to data whose CRC is `crc` (0 for none). Thread-safe. Uses the
// SSE4.2 instruction, or wide carry-less products, where the processor has them.
uint32_t Crc32c(const void* data, size_t size, uint32_t crc = 0);

// The ways of this processor to compute it, the one in use last; for tests.
using Crc32cWay = uint32_t (*)(const unsigned char* data, size_t size, uint32_t crc);
std::vector<Crc32cWay> Crc32cWays();

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_CRC32C_H_
