// What CUDA C++ gives a kernel without any include, for the host compiler: keywords, built-in variables and functions.
// Put before the text of every kernel (translate.py).
#ifndef VICUS_TESTS_EMULATION_CUDA_H_
#define VICUS_TESTS_EMULATION_CUDA_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

// NOLINTBEGIN(bugprone-reserved-identifier, cppcoreguidelines-interfaces-global-init): these names are CUDA's
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 5

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline const emulation::Dim3 &blockIdx = emulation::place.block, &gridDim = emulation::place.blocks,
                             &blockDim = emulation::place.threads;
inline const struct {
  const unsigned& x;
} threadIdx = {emulation::place.thread};

// --- Threads of a block, lanes of a warp ------------------------------------------------------------------------------

inline void __syncthreads() { emulation::block_barrier(0, 0, true); }
inline int __syncthreads_or(int flag) { return emulation::block_barrier(0, 0, true, flag != 0) ? 1 : 0; }
inline void __syncwarp(unsigned mask = emulation::kAllLanes) { emulation::meet(mask, nullptr, nullptr); }

namespace emulation {

struct Shuffle {
  std::uint64_t value, got;
  unsigned source;
};
void shuffle(void* const* lanes, unsigned mask);

template <class T>
T value_of_lane(unsigned mask, T value, unsigned source) {
  Shuffle mine = {0, 0, source};
  static_assert(sizeof(T) <= sizeof(mine.value));
  std::memcpy(&mine.value, &value, sizeof(T));
  meet(mask, &mine, shuffle);
  std::memcpy(&value, &mine.got, sizeof(T));
  return value;
}

struct Vote {
  bool yes;
  unsigned of_all;
};
void vote(void* const* lanes, unsigned mask);

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::value_of_lane(mask, value, static_cast<unsigned>(source) % emulation::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::value_of_lane(mask, value, threadIdx.x % emulation::kWarp ^ static_cast<unsigned>(lanes));
}
inline unsigned __ballot_sync(unsigned mask, bool yes) {
  emulation::Vote mine = {yes, 0};
  emulation::meet(mask, &mine, emulation::vote);
  return mine.of_all;
}
inline bool __any_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
inline bool __all_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) == mask; }

// --- Memory: one block runs at a time -----------------------------------------------------------------------------------

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline std::uint32_t __cvta_generic_to_shared(const void* address) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(address) - emulation::place.shared);
}
template <class T>
T* __cvta_generic_to_global(T* address) {
  return address;
}
inline long long clock64() { return 0; }

// --- Bits ------------------------------------------------------------------------------------------------------------------

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) >> shift % 32);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  unsigned made = 0;
  for (unsigned i = 0; i < 4; ++i) made |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return made;
}
// NOLINTEND(bugprone-reserved-identifier, cppcoreguidelines-interfaces-global-init)

#endif  // VICUS_TESTS_EMULATION_CUDA_H_
