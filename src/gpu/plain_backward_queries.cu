// Gradient of the queries by a plain kernel, one block per tile of queries over the key tiles of its hull, without
// atomics: dq = scale * sum over keys of ds * key (plain_gradients.cuh).
//
// Rows that fit into a tile stay in shared memory, and what one product needs is loaded during the other; longer rows go
// through it in parts, and results wider than kWide are cut into slices, a block each (blockIdx.y). If a result is not
// finite the block starts again without the keys that a query does not see, as in plain_forward.cu.
//
// Constants of the prologue, besides those of plain_gradients.cuh: kMinBlocks, kSharedBytes.
constexpr bool kRowsAreKeys = false;
#include "plain_gradients.cuh"

namespace vicus::gpu {

struct Smem {
  Acc query[kRows * kTileStride];
  Acc grad_output[kRows * kTileStride];
  Acc key[kCols * kTileStride];
  Acc value[kCols * kTileStride];
  Weights<kThreadCols> weights;
  Views views;
};

static_assert(sizeof(Smem) <= kSharedBytes);

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    plain_backward_queries(const __grid_constant__ PlainBackwardArgs plain) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  const ForwardArgs& args = plain.forward;
  Block block;
  const BlockTiles all = tiles_of_block(args);
  block.cell = all.cell;
  block.rows = all.tile;
  if (block.rows.box.empty()) return;
  note_views(args, block, smem.views);
  __syncthreads();
  const Box& hull = smem.views.hull;
  const int tiles = ColWalk::tiles(hull) + (kAdditional ? geometry::ceil_div(args.additional, kColCount) : 0);
  const int first_wide = blockIdx.y * kWide;

  const Cell& cell = block.cell;
  ColumnSource keys = {&args.key, place(args.key, cell, cell.first_key)};
  ColumnSource values = {&args.value, place(args.value, cell, cell.first_key)};
  if (kAdditional) {
    keys.more = &args.additional_keys, values.more = &args.additional_values;
    keys.placed_more = place_additional(args.additional_keys, cell);
    values.placed_more = place_additional(args.additional_values, cell);
  }
  const auto load_queries = [&](int part) {
    load_block_rows<kDepth, kHeadDim>(args.query, place(args.query, cell, cell.first_query), block, part * kDepth,
                                      smem.query);
  };
  const auto load_grads = [&](int part) {
    load_block_rows<kDepth, kHeadDimV>(plain.grad_output, place(plain.grad_output, cell, cell.first_query), block,
                                       part * kDepth, smem.grad_output);
  };
  const auto load_keys = [&](const ColWalk& walk, int first) {
    load_columns<kDepth, kHeadDim>(keys, block, walk, args.additional, first, smem.key);
    cp_async_commit();
  };
  const auto load_values = [&](const ColWalk& walk, int first) {
    load_columns<kDepth, kHeadDimV>(values, block, walk, args.additional, first, smem.value);
    cp_async_commit();
  };

  QueryNumbers numbers[kLaneRows];
  const Placed lse = place(args.logsumexp, cell, cell.first_query), delta = place(plain.delta, cell, cell.first_query);
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const Position p = row_at(block, row_of(i));
    numbers[i] = {0, 0};
    if (row_is(block, row_of(i), p)) numbers[i] = numbers_of(plain, lse, delta, p, row_head(block, row_of(i)));
  }

  WideSums out;
  for (bool careful = false;; careful = true) {
    out.clear();
    ColWalk walk;
    walk.begin(hull);
    if (kResident && tiles > 0) {
      load_queries(0);
      load_grads(0);
      load_values(walk, 0);
      load_keys(walk, 0);
    }
    for (int t = 0; t < tiles; ++t) {
      Scores scores = {}, products = {};
      ColWalk next = walk;
      next.next(hull);
      if (kResident) {  // in flight: values, then keys
        cp_async_wait<1>();
        __syncthreads();
        multiply_rows(smem.grad_output, smem.value, careful, products);
        cp_async_wait<0>();
        __syncthreads();
        if (t + 1 < tiles) load_values(next, 0);
        multiply_rows(smem.query, smem.key, careful, scores);
      } else {
        for (int part = 0; part < kPartsV; ++part) {
          __syncthreads();
          load_grads(part);
          load_values(walk, part * kDepth);
          cp_async_wait<0>();
          __syncthreads();
          multiply_rows(smem.grad_output, smem.value, careful, products);
        }
        for (int part = 0; part < kParts; ++part) {
          __syncthreads();
          load_queries(part);
          load_keys(walk, part * kDepth);
          cp_async_wait<0>();
          __syncthreads();
          multiply_rows(smem.query, smem.key, careful, scores);
        }
        __syncthreads();
        load_keys(walk, first_wide);
      }
      const bool whole = whole_tile(block, smem.views, walk, args.additional);
      make_logits(args, static_cast<Acc>(plain.scale_log2), block, walk, smem.views, whole, scores);
      make_gradients([&](int i, int) { return numbers[i]; }, careful, scores, products);
      smem.weights.put(products);
      if (kResident) {
        __syncwarp();
      } else {
        cp_async_wait<0>();
        __syncthreads();
      }
      smem.weights.multiply(smem.key, careful, out);
      if (kResident) {
        __syncthreads();
        if (t + 1 < tiles) load_keys(next, 0);
      }
      walk = next;
    }
    cp_async_wait<0>();
    if (careful || !__syncthreads_or(!out.all_finite())) break;
  }

  const Placed grads = place(plain.grad_query, cell, cell.first_query);
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    out.scale_row(i, static_cast<Acc>(plain.scale));
    const Position p = row_at(block, row_of(i));
    if (!row_is(block, row_of(i), p)) continue;
    Storage* const row = static_cast<Storage*>(plain.grad_query.data) + grads.row(p, row_head(block, row_of(i)));
    out.store_row<kHeadDim>(i, row, first_wide);
  }
}

}  // namespace vicus::gpu
