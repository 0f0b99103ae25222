// Between the emulated instructions: shared memory by address, and what a new block makes forget.
#ifndef VICUS_TESTS_EMULATION_SHARED_H_
#define VICUS_TESTS_EMULATION_SHARED_H_

#include <cstdint>

namespace emulation {

/// `bytes` bytes of shared memory, at an address aligned to as many.
unsigned char* shared_at(std::uint32_t address, unsigned bytes);

/// Where the copy engine and warpgroup products find what is at `address` without swizzling: pieces of 16 bytes are
/// permuted by the row of 128 bytes that they are in.
constexpr std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void reset_copies();
void reset_products();

}  // namespace emulation

#endif  // VICUS_TESTS_EMULATION_SHARED_H_
