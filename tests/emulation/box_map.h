// What the stand-in driver writes into a CUtensorMap, and the emulated copy engine reads.
#ifndef VICUS_TESTS_EMULATION_BOX_MAP_H_
#define VICUS_TESTS_EMULATION_BOX_MAP_H_

#include <cstdint>

namespace emulation {

struct BoxMap {
  static constexpr unsigned kRank = 5;

  const unsigned char* data;
  std::uint64_t stride[kRank - 1];  ///< bytes, of all axes but the innermost
  std::uint32_t size[kRank];
  std::uint16_t box[kRank];  ///< places that a box takes up
  std::uint8_t step[kRank];  ///< from one element of a box to the next
  std::uint8_t rank;
};
static_assert(sizeof(BoxMap) <= 128);

}  // namespace emulation

#endif  // VICUS_TESTS_EMULATION_BOX_MAP_H_
