// From sums in registers to the gradients of a block's rows, by the copy engine (kStoresBoxes), and what shared memory is
// written by matrices for.
#pragma once

#include "sm90_gradient_products.cuh"

namespace vicus::gpu {

// Columns 8 n to 8 n + 16 of the rows of the warp of `thread` to a slab.
__device__ __forceinline__ void put_sixteen(u32 thread, const u16* slab, int n, const u32 (&four)[4]) {
  const int lane = thread % 32, row = thread / 32 % 4 * 16 + lane % 16, eight = n % 8 + lane / 16;
  stmatrix_x4(smem_address(slab) + 2 * (row * kSlab + (eight ^ row % 8) * 8), four);
}

// Sums of both rows of a thread to slabs; adds to `finite` what is NaN once a value is NaN or infinite.
template <int kWidth>
__device__ __forceinline__ void put_sums(const float (&sums)[kWidth / 2], float factor, const u16* slabs,
                                         float (&finite)[2]) {
#pragma unroll
  for (int n = 0; n < kWidth / 8; n += 2) {
    u32 four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = n + i / 2 < kWidth / 8 ? 4 * n + 2 * i : 4 * n + 2 * (i % 2);  // beyond the last: anything
      const float a = sums[at] * factor, b = sums[at + 1] * factor;
      finite[i % 2] = fmaf(b, 0.0f, fmaf(a, 0.0f, finite[i % 2]));
      four[i] = Half::pack(a, b);
    }
    put_sixteen(threadIdx.x, slabs + n * 8 / kSlab * kRows * kSlab, n, four);
  }
}

// All sums of a block of one warpgroup, to where its rows lay and on by boxes: the copy engine leaves out what is beyond the
// layout. Whether any value is not finite; then all of them have arrived once the thread that stores meets the others.
__device__ __forceinline__ bool store_boxes(const Sm90BackwardArgs& all, Smem& smem, const Products& p,
                                            float first_factor, float (&finite)[2]) {
  const BackwardArgs& args = all.backward;
  if constexpr (kSumsFirst) put_sums<kHeadDim>(p.first_out, first_factor, smem.row_first(0), finite);
  if constexpr (kSumsSecond) put_sums<kHeadDimV>(p.second_out, 1.0f, smem.row_second(0), finite);
  fence_proxy_async();
  const bool wrong = __syncthreads_or(finite[0] != 0.0f || finite[1] != 0.0f) != 0;
  if (threadIdx.x == 0) {
    const RowTile& rows = smem.rows;
    const Position token =
        token_of(rows.cell, box_origin(rows.tile, 0), kOfKeys ? rows.cell.first_key : rows.cell.first_query);
    const auto store = [&](const Rows& to, const TensorMap& map, const u16* slabs, int count) {
      for (int s = 0; s < count && to.data != nullptr; ++s) {
        tma_store(map, smem_address(slabs + s * kRows * kSlab),
                  box_coordinates(s, rows.tile.head, to.head, token, rows.cell.batch).at);
      }
    };
    if constexpr (kSumsFirst) {
      store(kOfKeys ? args.grad_key : args.grad_query, all.sums_first, smem.row_first(0), kSlabs);
    }
    if constexpr (kSumsSecond) store(args.grad_value, all.sums_second, smem.row_second(0), kValueSlabs);
    bulk_commit();
    if (wrong) bulk_wait();
    else bulk_wait_read();
  }
  return wrong;
}

}  // namespace vicus::gpu
