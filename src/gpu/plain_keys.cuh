// Gradients of keys and values by plain kernels, one block per tile of keys (or additional tokens) of one key/value
// head, over the queries that see it, of all heads of its group; without atomics (plain_gradients.cuh):
//   dv = sum over queries of p * grad_output,  dk = scale * sum of ds * query
// Long rows and results that are not finite as in plain_backward_queries.cu; slices (blockIdx.y) cut both gradients.
#pragma once

constexpr bool kRowsAreKeys = true;
#include "plain_gradients.cuh"

namespace vicus::gpu {

static_assert(kThreads >= kCols);

struct Smem {
  Acc key[kRows * kTileStride];
  Acc value[kRows * kTileStride];
  Acc query[kCols * kTileStride];
  Acc grad_output[kCols * kTileStride];
  Weights<kThreadCols> weights;
  QueryNumbers numbers[kCols];
  Views views;
};

static_assert(sizeof(Smem) <= kSharedBytes);

// Where the rows of the block lie.
struct RowSources {
  const Rows *key, *value;
  Placed placed_key, placed_value;
};

// Adds what the queries of the block's cell contribute.
__device__ __forceinline__ void add_cell(const PlainBackwardArgs& plain, Block& block, const RowSources& rows,
                                         Smem& smem, bool careful, WideSums& grad_key, WideSums& grad_value) {
  const ForwardArgs& args = plain.forward;
  const Cell& cell = block.cell;
  const Box& hull = smem.views.hull;
  const int group = args.heads / args.heads_kv, first_head = block.rows.kv_head * group;
  const int per_head = ColWalk::tiles(hull);
  const int first_wide = blockIdx.y * kWide;
  const ColumnSource queries = {&args.query, place(args.query, cell, cell.first_query)};
  const ColumnSource grads = {&plain.grad_output, place(plain.grad_output, cell, cell.first_query)};
  const Placed lse = place(args.logsumexp, cell, cell.first_query), delta = place(plain.delta, cell, cell.first_query);

  const auto load_key_part = [&](int part) {
    load_block_rows<kDepth, kHeadDim>(*rows.key, rows.placed_key, block, part * kDepth, smem.key);
  };
  const auto load_value_part = [&](int part) {
    load_block_rows<kDepth, kHeadDimV>(*rows.value, rows.placed_value, block, part * kDepth, smem.value);
  };
  const auto load_queries = [&](const ColWalk& walk, int first) {
    load_columns<kDepth, kHeadDim>(queries, block, walk, 0, first, smem.query);
    cp_async_commit();
  };
  const auto load_grads = [&](const ColWalk& walk, int first) {
    load_columns<kDepth, kHeadDimV>(grads, block, walk, 0, first, smem.grad_output);
    cp_async_commit();
  };

  for (int head = 0; head < group; head += kTileHeads) {
    block.rows.head = first_head + head;
    block.rows.heads = geometry::lo(kTileHeads, group - head);
    ColWalk walk;
    walk.begin(hull);
    __syncthreads();
    if (kResident && per_head > 0) {
      load_key_part(0);
      load_value_part(0);
      load_grads(walk, 0);
      load_queries(walk, 0);
    }
    for (int t = 0; t < per_head; ++t) {
      Scores scores = {}, products = {};
      ColWalk next = walk;
      next.next(hull);
      QueryNumbers mine = {0, 0};
      const int c = threadIdx.x;
      if (c < kCols) {
        long long unused = 0;
        if (column_offset(lse, block, walk, c, unused)) {
          mine = numbers_of(plain, lse, delta, walk.position(c), block.rows.head + c / kPositions);
        }
      }
      if (kResident) {  // in flight: gradients, then queries
        cp_async_wait<1>();
        __syncthreads();
        if (c < kCols) smem.numbers[c] = mine;
        multiply_rows(smem.value, smem.grad_output, careful, products);
        cp_async_wait<0>();
        __syncthreads();
        multiply_rows(smem.key, smem.query, careful, scores);
      } else {
        for (int part = 0; part < kPartsV; ++part) {
          __syncthreads();
          if (c < kCols) smem.numbers[c] = mine;
          load_value_part(part);
          load_grads(walk, part * kDepth);
          cp_async_wait<0>();
          __syncthreads();
          multiply_rows(smem.value, smem.grad_output, careful, products);
        }
        for (int part = 0; part < kParts; ++part) {
          __syncthreads();
          load_key_part(part);
          load_queries(walk, part * kDepth);
          cp_async_wait<0>();
          __syncthreads();
          multiply_rows(smem.key, smem.query, careful, scores);
        }
        __syncthreads();
        load_grads(walk, first_wide);
        load_queries(walk, first_wide);
        cp_async_wait<0>();
        __syncthreads();
      }
      const bool whole = whole_tile(block, smem.views, walk, 0);
      make_logits(args, static_cast<Acc>(plain.scale_log2), block, walk, smem.views, whole, scores);
      make_gradients([&](int, int j) { return smem.numbers[col_of(j)]; }, careful, scores, products);
      smem.weights.put(scores);
      __syncwarp();
      smem.weights.multiply(smem.grad_output, careful, grad_value);
      __syncthreads();
      if (kResident && t + 1 < per_head) load_grads(next, 0);
      smem.weights.put(products);
      __syncwarp();
      smem.weights.multiply(smem.query, careful, grad_key);
      __syncthreads();
      if (kResident && t + 1 < per_head) load_queries(next, 0);
      walk = next;
    }
    cp_async_wait<0>();
  }
}

__device__ __forceinline__ void store_gradients(const PlainBackwardArgs& plain, const Block& block, const Rows& key,
                                                const Placed& placed_key, const Rows& value, const Placed& placed_value,
                                                WideSums& grad_key, const WideSums& grad_value) {
  const int first_wide = blockIdx.y * kWide;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    grad_key.scale_row(i, static_cast<Acc>(plain.scale));
    const Position p = row_at(block, row_of(i));
    if (!row_is(block, row_of(i), p)) continue;
    const int head = block.rows.kv_head;
    if (key.data != nullptr) {
      grad_key.store_row<kHeadDim>(i, static_cast<Storage*>(key.data) + placed_key.row(p, head), first_wide);
    }
    if (value.data != nullptr) {
      grad_value.store_row<kHeadDimV>(i, static_cast<Storage*>(value.data) + placed_value.row(p, head), first_wide);
    }
  }
}

}  // namespace vicus::gpu
