// What loads the tiles of the backward kernels of sm90.
#pragma once

#include "sm90_statistics.cuh"

namespace vicus::gpu {

// Has the copy engine load the rows of the block. One thread.
__device__ __forceinline__ void load_rows(const Sm90BackwardArgs& args, Smem& smem, const RowTile& rows) {
  const BackwardArgs& b = args.backward;
  const Cell& cell = rows.cell;
  const int first_row = kOfKeys ? cell.first_key : cell.first_query;
  const Rows &row_first = kOfKeys ? b.key : b.query, &row_second = kOfKeys ? b.value : b.grad_output;
  mbarrier_expect(smem_address(&smem.rows_full), kRowSlabs * kBoxRows * kTokenBytes);
  for (int w = 0; w < kWarpgroups; ++w) {
    const Position token = token_of(cell, box_origin(rows.tile, w), first_row);
    load_box<kSlabs, kRows>(args.row_first, smem.row_first(w), smem.rows_full, cell.batch, rows.tile.head,
                            row_first.head, token);
    if constexpr (kSumsFirst) {
      load_box<kValueSlabs, kRows>(args.row_second, smem.row_second(w), smem.rows_full, cell.batch, rows.tile.head,
                                   row_second.head, token);
    }
  }
}

// Loads columns, a tile at a time.
struct Loader {
  const Sm90BackwardArgs& args;
  Smem& smem;
  Ring ring;
  SecondRing second_ring;
  ColumnWalk at;
  int left;

  __device__ __forceinline__ void begin() {
    at.begin(smem);
    left = smem.tiles;
  }

  // The next tile, once its stage is empty.
  __device__ __forceinline__ void next() {
    mbarrier_wait(smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);
    if (!kCrowd || threadIdx.x == 0) load_boxes();
    if constexpr (kCrowd && kOfKeys) {
      if (threadIdx.x >= 32 * kFirstCopyWarp) copy_statistics(args.backward, smem, at, ring.stage);
    }
    at.next(smem);
    ring.next();
    --left;
  }

 private:
  __device__ __forceinline__ void load_boxes() {
    const BackwardArgs& b = args.backward;
    const Cell& cell = smem.rows.cell;
    const int first_column = kOfKeys ? cell.first_query : cell.first_key;
    const Rows &first = kOfKeys ? b.query : b.key, &second = kOfKeys ? b.grad_output : b.value;
    const u64& full = smem.full[ring.stage];
    ColumnTile& note = smem.tile[ring.stage];
    note.walk = at.walk;
    for (int w = 0; w < kWarpgroups && !kAlwaysMasked; ++w) {
      note.use[w] = use_of(smem.any[w], smem.all[w], at.walk, b.additional);
    }
    mbarrier_expect(smem_address(&full), (kSlabs + (kApart ? 0 : kValueSlabs)) * kColumns * kTokenBytes);
    const bool more = kAdditional && at.walk.additional;
    const Position token = more ? at.walk.origin : token_of(cell, at.walk.origin, first_column);
    load_box<kSlabs, kColumns>(more ? args.additional_first : args.first, smem.first[ring.stage][0], full, cell.batch,
                               at.head, more ? b.additional_keys.head : first.head, token);
    const int stage = kApart ? second_ring.stage : ring.stage;
    const u64& second_full = kApart ? smem.second_full[stage] : full;
    if constexpr (kApart) {
      mbarrier_wait(smem_address(&smem.second_empty[stage]), second_ring.phase ^ 1);
      mbarrier_expect(smem_address(&second_full), kValueSlabs * kColumns * kTokenBytes);
      second_ring.next();
    }
    load_box<kValueSlabs, kColumns>(more ? args.additional_second : args.second, smem.second[stage][0], second_full,
                                    cell.batch, at.head, more ? b.additional_values.head : second.head, token);
  }
};

}  // namespace vicus::gpu
