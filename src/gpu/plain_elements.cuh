// Storage types of the plain kernels and the type they compute in, rows in registers, and sums over lanes. Constants of
// the prologue: kElement (vicus::DType), kVectors (all rows start at multiples of 16 bytes and have a multiple of 16 bytes).
#pragma once

#include "mma.cuh"

namespace vicus::gpu {

enum class Type { f32, f64, bf16, f16 };  // the order of vicus::DType

template <Type>
struct Element;
template <>
struct Element<Type::f32> {
  using Storage = float;
  using Acc = float;
  static __device__ __forceinline__ float load(float x) { return x; }
  static __device__ __forceinline__ float store(float x) { return x; }
};
template <>
struct Element<Type::f64> {
  using Storage = double;
  using Acc = double;
  static __device__ __forceinline__ double load(double x) { return x; }
  static __device__ __forceinline__ double store(double x) { return x; }
};
template <>
struct Element<Type::bf16> {
  using Storage = u16;
  using Acc = float;
  static __device__ __forceinline__ float load(u16 x) { return from_bf16(x); }
  static __device__ __forceinline__ u16 store(float x) { return static_cast<u16>(pack_bf16(x, 0.0f)); }
};
template <>
struct Element<Type::f16> {
  using Storage = u16;
  using Acc = float;
  static __device__ __forceinline__ float load(u16 x) { return from_f16(x); }
  static __device__ __forceinline__ u16 store(float x) { return static_cast<u16>(pack_f16(x, 0.0f)); }
};

using Values = Element<static_cast<Type>(kElement)>;
using Storage = Values::Storage;
using Acc = Values::Acc;

constexpr Acc kInfinity = static_cast<Acc>(1.0f / 0.0f);
constexpr Acc kLn2 = static_cast<Acc>(0.693147180559945309417);
constexpr Acc kLog2OfE = static_cast<Acc>(1.44269504088896340736);

__device__ __forceinline__ float exp2_of(float x) { return exp2_approx(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ bool finite(Acc x) { return x - x == 0; }

// Rows between memory and registers: 16 bytes of values to compute with, 16 bytes of storage, or one value.
constexpr int kVec = 16 / sizeof(Acc);
constexpr int kPiece = kVectors ? 16 / sizeof(Storage) : 1;

__device__ __forceinline__ u32 pack(float low, float high) {
  return static_cast<u16>(Values::store(low)) | static_cast<u32>(static_cast<u16>(Values::store(high))) << 16;
}
__device__ __forceinline__ void load_values(const float* p, float (&v)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(p);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}
__device__ __forceinline__ void load_values(const double* p, double (&v)[2]) {
  const double2 x = *reinterpret_cast<const double2*>(p);
  v[0] = x.x, v[1] = x.y;
}
__device__ __forceinline__ void load_values(const u16* p, float (&v)[8]) {
  const uint4 x = *reinterpret_cast<const uint4*>(p);
  const u32 two[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = Values::load(static_cast<u16>(two[i / 2] >> (i % 2 * 16)));
}
template <class From, class To>
__device__ __forceinline__ void load_values(const From* p, To (&v)[1]) {
  v[0] = Values::load(*p);
}
__device__ __forceinline__ void store_values(float* p, const float (&v)[4]) {
  *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
}
__device__ __forceinline__ void store_values(double* p, const double (&v)[2]) {
  *reinterpret_cast<double2*>(p) = double2{v[0], v[1]};
}
__device__ __forceinline__ void store_values(u16* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = uint2{pack(v[0], v[1]), pack(v[2], v[3])};
}
__device__ __forceinline__ void store_values(u16* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) = uint4{pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
}
template <class To, class From>
__device__ __forceinline__ void store_values(To* p, const From (&v)[1]) {
  *p = Values::store(v[0]);
}

// Sums over groups of `kLanes` neighbouring lanes; all lanes of a group call it together.
template <int kLanes, class T>
__device__ __forceinline__ T sum_over(T x) {
  const u32 group = (kLanes == 32 ? ~0u : (1u << kLanes % 32) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(group, x, step);
  return x;
}

// a . b of `kWidth` values by a group of kLanes lanes; each lane of the group gets it.
template <int kWidth, int kLanes>
__device__ __forceinline__ Acc dot_rows(const Storage* a, const Storage* b) {
  Acc sum = 0;
#pragma unroll 4
  for (int d = threadIdx.x % kLanes * kPiece; d < kWidth; d += kLanes * kPiece) {
    Acc x[kPiece], y[kPiece];
    load_values(a + d, x);
    load_values(b + d, y);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sum += x[i] * y[i];
  }
  return sum_over<kLanes>(sum);
}

// A table of biases: value `index` of `data`.
template <int kType>
__device__ __forceinline__ Acc load_typed(const void* data, long long index) {
  using Table = Element<static_cast<Type>(kType)>;
  return static_cast<Acc>(Table::load(static_cast<const typename Table::Storage*>(data)[index]));
}
template <int kType>
__device__ __forceinline__ void store_typed(void* data, long long index, double x) {
  using Table = Element<static_cast<Type>(kType)>;
  static_cast<typename Table::Storage*>(data)[index] = Table::store(static_cast<typename Table::Acc>(x));
}

// Sum over the threads of a block, in a fixed order; thread 0 gets it. `scratch` holds a double per warp.
__device__ __forceinline__ double sum_over_block(double x, double* scratch) {
  const int warps = blockDim.x / 32;
  x = sum_over<32>(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < warps; ++w) sum += scratch[w];
  return sum;
}

}  // namespace vicus::gpu
