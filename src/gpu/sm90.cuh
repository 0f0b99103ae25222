// One function per instruction of sm_90a: barriers in shared memory, the copy engine, warpgroup products, register
// budgets. The products themselves have their shapes from the prologue: wgmma_scores and wgmma_values of spec.cc.
#pragma once

#include "mma.cuh"
#include "sm90_args.h"

namespace vicus::gpu {

__device__ __forceinline__ void mbarrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// An arrival once the copies by cp_async that this thread has begun are there.
__device__ __forceinline__ void mbarrier_arrive_copied(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// An arrival that also announces `bytes` of copies.
__device__ __forceinline__ void mbarrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
// Until the phase of `parity` is over. With kPatience, for at most that many cycles: results are wrong afterwards, but
// there are some.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  const long long start = kPatience > 0 ? clock64() : 0;
  while (!mbarrier_try_wait(barrier, parity)) {
    if (kPatience > 0 && clock64() - start > kPatience) return;
  }
}

// A box from coordinates `c`, innermost first, to shared memory; its bytes count at `barrier`.
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 barrier, const int (&c)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
      : "memory");
}

// A box in shared memory to coordinates `c` of a tensor, where it has those. As boxes that are added, below.
__device__ __forceinline__ void tma_store(const TensorMap& map, u32 smem, const int (&c)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
      "r"(smem), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
      : "memory");
}

// Adds a box of float32 in shared memory to coordinates `c` of a tensor, where it has those. Boxes belong to a group, which
// bulk_commit ends.
__device__ __forceinline__ void tma_add(const TensorMap& map, u32 smem, const int (&c)[5]) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
          &map),
      "r"(smem), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
      : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all groups have left shared memory.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Until all groups are where they go.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes what this thread wrote to shared memory seen by the copy engine and by warpgroup products.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The same as wgmma_wait<0>, kept apart from it: where both sides of a branch wait, compilers would wait before it.
__device__ __forceinline__ void wgmma_wait_other() {
  asm volatile("wgmma.wait_group.sync.aligned 0; // other" ::: "memory");
}
// Keeps the compiler from moving uses of accumulators over what comes before or after.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Arrives at a named barrier of `threads` threads without waiting.
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Four 8 by 8 matrices; the rows of matrix i at the addresses of lanes 8 i to 8 i + 7.
__device__ __forceinline__ void stmatrix_x4(u32 smem, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// Stores where `wanted`. By a branch nothing else would be moved across; and compilers make four of some stores of 16 bytes.
__device__ __forceinline__ void store_one(float* to, float x, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.global.f32 [%0], %1;\n}" ::"l"(__cvta_generic_to_global(to)),
      "f"(x), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ __forceinline__ void store_four(void* to, const u32 (&r)[4], bool wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(static_cast<int>(wanted))
               : "memory");
}

// Bits [0, count) of a word; count may be anything.
__device__ __forceinline__ u32 bits_below(int count) {
  u32 mask;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(mask) : "r"(count < 0 ? 0 : count));
  return mask;
}

// Where a warpgroup product finds an operand in shared memory, rows of 128 bytes swizzled by the copy engine (8 rows of 16
// bytes permuted by their row). `step` is from one slab of 64 columns to the next, used where columns are the rows of the
// product (value); unused otherwise.
__device__ __forceinline__ u64 operand(u32 smem, int step) {
  constexpr u64 kSwizzle128 = 1ull << 62, kEightRows = 1024 / 16;
  return kSwizzle128 | kEightRows << 32 | static_cast<u64>(step / 16) << 16 | (smem & 0x3ffff) / 16;
}

}  // namespace vicus::gpu
