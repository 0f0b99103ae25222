// Attention forward in float32 (float64 for float64 storage) for any storage type and any head dims (plain.cuh). One block per tile of queries, over the key tiles of its hull; online softmax in powers of two.
//
// Keys of the next tile are loaded while values are multiplied, values while keys are. A head_dim above kDepth is
// multiplied in parts; a head_dim_v above kWide is cut into slices, a block each (blockIdx.y). If a result is not finite,
// the block starts again and leaves out the values of keys that a query does not see, as zero times NaN is not zero.
//
// Constants of the prologue, besides those of plain_tiles.cuh: kMinBlocks, kSharedBytes, kLogsumexp.
constexpr bool kRowsAreKeys = false;
#include "plain_tiles.cuh"

namespace vicus::gpu {

constexpr int kParts = (kHeadDim + kDepth - 1) / kDepth;

struct Smem {
  Acc query[kRows * (kDepth + kPad)];
  Acc key[kCols * (kDepth + kPad)];
  Acc value[kCols * (kWide + kPad)];
  Weights<kThreadCols> weights;
  Views views;
};

static_assert(sizeof(Smem) <= kSharedBytes);

struct Softmax {
  Acc top[kLaneRows], sum[kLaneRows];
  __device__ __forceinline__ void begin() {
    for (int i = 0; i < kLaneRows; ++i) {
      top[i] = -kInfinity;
      sum[i] = 0;
    }
  }
  // Logits to weights; sums so far are scaled to the new maximum.
  __device__ __forceinline__ void step(Scores& scores, bool careful, WideSums& out) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      Acc most = top[i];
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) most = larger(most, scores[i][j]);
#pragma unroll
      for (int lane = 1; lane < kColLanes; lane *= 2) most = larger(most, __shfl_xor_sync(~0u, most, lane));
      const Acc base = most == -kInfinity ? 0 : most;
      const Acc factor = top[i] == -kInfinity ? 0 : exp2_of(top[i] - base);
      top[i] = most;
      Acc total = 0;
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        const bool hidden = scores[i][j] == -kInfinity;
        scores[i][j] = exp2_of(scores[i][j] - base);
        total += scores[i][j];
        if (careful && hidden) scores[i][j] = hidden_weight<Acc>();
      }
      sum[i] = sum[i] * factor + total;
      out.scale_row(i, factor);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    plain_forward(const __grid_constant__ PlainForwardArgs plain) {
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
  const Placed queries = place(args.query, cell, cell.first_query);
  const auto load_queries = [&](int part) {
    load_block_rows<kDepth, kHeadDim>(args.query, queries, block, part * kDepth, smem.query);
  };
  const auto load_keys = [&](const ColWalk& walk, int part) {
    load_columns<kDepth, kHeadDim>(keys, block, walk, args.additional, part * kDepth, smem.key);
  };

  Softmax softmax;
  WideSums out;
  for (bool careful = false;; careful = true) {
    softmax.begin();
    out.clear();
    ColWalk walk;
    walk.begin(hull);
    if (kParts == 1 && tiles > 0) {
      load_queries(0);
      load_keys(walk, 0);
    }
    for (int t = 0; t < tiles; ++t) {
      Scores scores = {};
      for (int part = 0; part < kParts; ++part) {
        if (kParts > 1) {
          __syncthreads();
          load_queries(part);
          load_keys(walk, part);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (part == kParts - 1) {
          load_columns<kWide, kHeadDimV>(values, block, walk, args.additional, first_wide, smem.value);
          cp_async_commit();
        }
        multiply_rows(smem.query, smem.key, careful, scores);
      }
      const bool whole = whole_tile(block, smem.views, walk, args.additional);
      make_logits(args, static_cast<Acc>(plain.scale_log2), block, walk, smem.views, whole, scores);
      softmax.step(scores, careful, out);
      smem.weights.put(scores);
      walk.next(hull);
      cp_async_wait<0>();
      __syncthreads();
      if (kParts == 1 && t + 1 < tiles) load_keys(walk, 0);
      smem.weights.multiply(smem.value, careful, out);
    }
    cp_async_wait<0>();
    if (careful || !__syncthreads_or(!out.all_finite())) break;
  }

  const Placed output = place(args.output, cell, cell.first_query);
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const Acc sum = sum_over<kColLanes>(softmax.sum[i]);
    out.scale_row(i, sum == 0 ? 0 : 1 / sum);
    const int r = row_of(i);
    const Position p = row_at(block, r);
    if (!row_is(block, r, p)) continue;
    const int head = row_head(block, r);
    out.store_row<kHeadDimV>(i, static_cast<Storage*>(args.output.data) + output.row(p, head), first_wide);
    if (kLogsumexp && blockIdx.y == 0 && threadIdx.x % kColLanes == 0) {
      const Acc lse = sum == 0 ? -kInfinity : (softmax.top[i] + log2_of(sum)) * kLn2;
      static_cast<Acc*>(args.logsumexp.data)[place(args.logsumexp, cell, cell.first_query).row(p, head)] = lse;
    }
  }
}

}  // namespace vicus::gpu
