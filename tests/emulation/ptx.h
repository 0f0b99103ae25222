// The instructions that kernels use, one function each, by the name that translate.py makes of the instruction's own:
// dots are underscores, operands are in the order of the text, a list in braces is one argument. An instruction that is
// not here does not compile, and the compiler's error names it.
//
// Copies and products that a GPU does in the meantime are done here as late as a kernel allows: when it waits for them.
// What copies will overwrite is spoiled from the start.
#ifndef VICUS_TESTS_EMULATION_PTX_H_
#define VICUS_TESTS_EMULATION_PTX_H_

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "machine.h"

namespace ptx {

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

/// Operands in braces, by their addresses.
template <class T, class... Rest>
auto list(T& first, Rest&... rest) {
  return std::array<std::remove_const_t<T>*, 1 + sizeof...(Rest)>{const_cast<std::remove_const_t<T>*>(&first),
                                                                  const_cast<std::remove_const_t<T>*>(&rest)...};
}
template <class T, std::size_t kCount>
using List = std::array<T*, kCount>;

struct Unused {};
inline constexpr Unused unused;  // the operand _

// --- Registers --------------------------------------------------------------------------------------------------------------

template <class T>
void mov_b32(T& to, T from) {
  to = from;
}
inline void setp_ne_b32(bool& to, int a, int b) { to = a != b; }
inline void selp_u32(u32& to, u32 a, u32 b, bool which) { to = which ? a : b; }
inline void bmsk_clamp_b32(u32& to, u32 first, u32 width) {
  const u64 bits = width >= 32 ? 0xffffffff : (u64{1} << width) - 1;
  to = first >= 32 ? 0 : static_cast<u32>(bits << first);
}
inline void ex2_approx_ftz_f32(float& to, float x) { to = std::exp2(x); }
inline void lg2_approx_f32(float& to, float x) { to = std::log2(x); }
inline void rcp_approx_ftz_f32(float& to, float x) { to = 1 / x; }
u16 bf16_of(float x);
u16 f16_of(float x);
float of_bf16(u16 x);
float of_f16(u16 x);
inline void cvt_rn_bf16x2_f32(u32& to, float high, float low) { to = bf16_of(low) | u32{bf16_of(high)} << 16; }
inline void cvt_rn_f16x2_f32(u32& to, float high, float low) { to = f16_of(low) | u32{f16_of(high)} << 16; }
inline void cvt_f32_f16(float& to, u16 x) { to = of_f16(x); }
inline void setmaxnreg_dec_sync_aligned_u32(int) {}
inline void setmaxnreg_inc_sync_aligned_u32(int) {}

// --- Barriers ---------------------------------------------------------------------------------------------------------------

inline void bar_sync(int barrier, int threads) {
  emulation::block_barrier(static_cast<unsigned>(barrier), static_cast<unsigned>(threads), true);
}
inline void bar_arrive(int barrier, int threads) {
  emulation::block_barrier(static_cast<unsigned>(barrier), static_cast<unsigned>(threads), false);
}
void mbarrier_init_shared_cta_b64(u32 barrier, int arrivals);
void mbarrier_arrive_shared_cta_b64(Unused, u32 barrier);
void mbarrier_arrive_expect_tx_shared_cta_b64(Unused, u32 barrier, int bytes);
void mbarrier_try_wait_parity_shared_cta_b64(bool& done, u32 barrier, u32 parity);
inline void fence_mbarrier_init_release_cluster() {}
// Here one kernel is done before the next one begins.
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void fence_proxy_async_shared_cta() {}

// --- Memory -----------------------------------------------------------------------------------------------------------------

void cp_async(u32 shared, const void* global, int bytes, int present);
inline void cp_async_cg_shared_global(u32 shared, const void* global, int bytes, int present) {
  cp_async(shared, global, bytes, present);
}
inline void cp_async_ca_shared_global(u32 shared, const void* global, int bytes, int present) {
  cp_async(shared, global, bytes, present);
}
void cp_async_commit_group();
/// Arrives once the copies of this thread that are in no group yet are there. (On a GPU: all of its copies.)
void cp_async_mbarrier_arrive_noinc_shared_cta_b64(u32 barrier);
void cp_async_wait_group(int pending);
void cp_async_bulk_tensor_5d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(u32 shared, const void* map,
                                                                                   List<int, 5> at, u32 barrier);
/// Stores a box of 16-bit values, swizzled.
void cp_async_bulk_tensor_5d_global_shared_cta_tile_bulk_group(const void* map, List<int, 5> at, u32 shared);
/// Adds a box of float32, without swizzling.
void cp_reduce_async_bulk_tensor_5d_global_shared_cta_add_tile_bulk_group(const void* map, List<int, 5> at, u32 shared);
void cp_async_bulk_commit_group();
void cp_async_bulk_wait_group_read(int pending);
inline void cp_async_bulk_wait_group(int pending) { cp_async_bulk_wait_group_read(pending); }
inline void st_global_f32(float* to, float value) { *to = value; }
inline void st_global_v4_b32(void* to, List<u32, 4> values) {
  if (std::bit_cast<std::uintptr_t>(to) % 16 != 0) emulation::fail("st.v4 at an odd address");
  for (unsigned i = 0; i < 4; ++i) static_cast<u32*>(to)[i] = *values[i];
}
inline void red_global_add_v4_f32(float* to, List<float, 4> values) {
  if (std::bit_cast<std::uintptr_t>(to) % 16 != 0) emulation::fail("red.v4 at an odd address");
  for (unsigned i = 0; i < 4; ++i) to[i] += *values[i];
}
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(List<u32, 4> to, u32 shared);
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(List<u32, 4> to, u32 shared);
void stmatrix_sync_aligned_m8n8_x4_shared_b16(u32 shared, List<u32, 4> from);

// --- Products of a warp --------------------------------------------------------------------------------------------------------

void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(List<float, 4> d, List<u32, 4> a, List<u32, 2> b,
                                                         List<float, 4> c);
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(List<float, 4> d, List<u32, 4> a, List<u32, 2> b,
                                                       List<float, 4> c);
void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(List<float, 4> d, List<u32, 4> a, List<u32, 2> b,
                                                        List<float, 4> c);

// --- Products of a warpgroup ------------------------------------------------------------------------------------------------------

/// d = d + a . b, or a . b where `add` is false; of 64 rows and 16 features. `d` is an array, as are its addresses.
struct Product {
  float* d = nullptr;
  int columns = 0;
  bool add = false, half = false, registers = false, a_by_features = false, b_by_features = false;
  std::array<u32, 4> a_registers{};
  u64 a = 0, b = 0;
};
void begin(const Product& product);

template <int kColumns, std::size_t kCount>
Product product_of(const List<float, kCount>& d, u64 b, bool add, bool half, int b_by_features) {
  static_assert(kCount == kColumns / 2);
  for (std::size_t i = 0; i < kCount; ++i) {
    if (d[i] != d[0] + i) emulation::fail("sums of a warpgroup product that are not one array");
  }
  return {.d = d[0], .columns = kColumns, .add = add, .half = half, .b_by_features = b_by_features != 0, .b = b};
}

template <int kColumns, std::size_t kCount>
void begin(const List<float, kCount>& d, const List<u32, 4>& a, u64 b, bool add, int a_factor, int b_factor,
           int b_by_features, bool half) {
  if (a_factor != 1 || b_factor != 1) emulation::fail("a warpgroup product with negated operands");
  Product product = product_of<kColumns>(d, b, add, half, b_by_features);
  product.registers = true;
  for (unsigned i = 0; i < 4; ++i) product.a_registers[i] = *a[i];
  begin(product);
}
template <int kColumns, std::size_t kCount>
void begin(const List<float, kCount>& d, u64 a, u64 b, bool add, int a_factor, int b_factor, int a_by_features,
           int b_by_features, bool half) {
  if (a_factor != 1 || b_factor != 1) emulation::fail("a warpgroup product with negated operands");
  Product product = product_of<kColumns>(d, b, add, half, b_by_features);
  product.a = a;
  product.a_by_features = a_by_features != 0;
  begin(product);
}

template <int kColumns, class... Operands>
void wgmma_mma_async_sync_aligned_m64k16_f32_bf16_bf16(const Operands&... operands) {
  begin<kColumns>(operands..., false);
}
template <int kColumns, class... Operands>
void wgmma_mma_async_sync_aligned_m64k16_f32_f16_f16(const Operands&... operands) {
  begin<kColumns>(operands..., true);
}
inline void wgmma_fence_sync_aligned() { emulation::meet(emulation::kAllLanes, nullptr, nullptr); }
void wgmma_commit_group_sync_aligned();
void wgmma_wait_group_sync_aligned(int pending);

}  // namespace ptx

#endif  // VICUS_TESTS_EMULATION_PTX_H_
