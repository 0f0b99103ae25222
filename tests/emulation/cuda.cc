#include "cuda.h"

namespace emulation {

void shuffle(void* const* lanes, unsigned mask) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& mine = *static_cast<Shuffle*>(lanes[lane]);
    if ((mask >> mine.source & 1) == 0)
      fail("a shuffle from lane %u, which is not in the mask %08x", mine.source, mask);
    mine.got = static_cast<Shuffle*>(lanes[mine.source])->value;
  }
}

void vote(void* const* lanes, unsigned mask) {
  unsigned all = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0 && static_cast<Vote*>(lanes[lane])->yes) all |= 1u << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0) static_cast<Vote*>(lanes[lane])->of_all = all;
  }
}

}  // namespace emulation
