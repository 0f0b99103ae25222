// Sums by the scores with tensor cores; see unfused_tiles.cuh. Rows of the product are the positions that the warp owns,
// columns of the first operand those it walks over: with kRowsAreKeys rows are keys and columns the queries that see them,
// of all heads of the group, else rows are queries and columns the keys they see, and then the additional tokens.
//
// A score that a pair does not have counts as 0. Zero times a value that is not finite is not zero: where a result is not
// finite, the warp starts again with the pairs alone (unfused_sums.cuh).
#include "unfused_sums.cuh"
#include "unfused_tiles.cuh"

namespace vicus::gpu {

constexpr int kGroups = (kHeadDim + 63) / 64;  // features that eight lanes load at once, a pass each

// What a lane adds in a step: scores of rows lane / 4 and lane / 4 + 8 with four columns, and those columns.
struct Step {
  u16 scores[2][4];
  const Storage* columns[4];
};

struct Results {
  float at[8][4] = {};

  // Feature 8 (lane / 4) + j of a group belongs to product j.
  __device__ __forceinline__ void add(const Step& step, int group) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = step.scores[i % 2][i / 2 * 2] | static_cast<u32>(step.scores[i % 2][i / 2 * 2 + 1]) << 16;
    }
    u32 x[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 piece = load_piece(step.columns[i], 64 * group + threadIdx.x % 32 / 4 * 8);
      x[i][0] = piece.x, x[i][1] = piece.y, x[i][2] = piece.z, x[i][3] = piece.w;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const u32 which = j % 2 == 0 ? 0x5410 : 0x7632;
      Half::mma(at[j], a, __byte_perm(x[0][j / 2], x[1][j / 2], which), __byte_perm(x[2][j / 2], x[3][j / 2], which));
    }
  }
  __device__ __forceinline__ bool all_finite() const {
    bool good = true;
#pragma unroll
    for (int i = 0; i < 32; ++i) good = good && finite(at[i / 4][i % 4]);
    return good;
  }
  // Row lane / 4 + 8 * half.
  __device__ __forceinline__ void store(Storage* row, int half, int group) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int feature = 64 * group + threadIdx.x % 4 * 16 + 8 * i;
      if (feature >= kHeadDim) continue;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = at[j][2 * half + i];
      store_values(row + feature, v);
    }
  }
};

// The columns of the window, four in a row to a lane.
template <class Add>
__device__ __forceinline__ void for_each_step(const UnfusedArgs& args, int batch, int head, const Tile& tile,
                                              const Add& add) {
  const int lane = threadIdx.x % 32, kv_head = head / (args.heads / args.heads_kv);
  const Lines score_lines = lines_of(args.scores, batch, head, tile);
  const Lines column_lines =
      kRowsAreKeys ? lines_of(args.rows, batch, head, tile) : lines_of(args.keys, batch, kv_head, tile);
  const Rows& columns = kRowsAreKeys ? args.rows : args.keys;
  Token rows[2];
  bool has[2];
  Window windows[2];
  const Storage* row_scores[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    has[i] = tile.has(lane / 4 + 8 * i);
    rows[i] = tile.position(lane / 4 + 8 * i);
    if (kRowsAreKeys) continue;
    row_scores[i] = values(args.scores, score_lines.at(rows[i]));
    windows[i].note(tile.grid, rows[i]);
  }
  Box box;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    box.axis[a] = a < kFirstAxis ? Span{0, 1}
                  : kRowsAreKeys ? geometry::queries_of(tile.grid.axis[a], tile.box.axis[a])
                                 : geometry::hull(tile.grid.axis[a], tile.box.axis[a]);
  }
  const int count = static_cast<int>(box.volume());
  const Token jump = jump_of(box, 13), one = jump_of(box, 1);
  Walk walk;
  walk.begin(box, lane % 4 * 4);
#pragma unroll 1
  for (int first = 0; first < count; first += 16) {
    Step step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i > 0) walk.advance(box, one, 1);
      const Token& column = walk.position;
      step.columns[i] = values(columns, column_lines.at(column));
      Window window;
      const Storage* scores = nullptr;
      if (kRowsAreKeys) {
        scores = values(args.scores, score_lines.at(column));
        window.note(tile.grid, column);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int slot = kRowsAreKeys ? window.slot_of(tile.grid, rows[r]) : windows[r].slot_of(tile.grid, column);
        const bool seen = slot >= 0 && walk.left > 0 && has[r];
        step.scores[r][i] = seen ? (kRowsAreKeys ? scores : row_scores[r])[slot] : 0;
      }
    }
    walk.advance(box, jump, 13);
    add(step);
  }
}

// The additional tokens, for rows that are queries.
template <class Add>
__device__ __forceinline__ void for_each_token(const UnfusedArgs& args, int batch, int head, const Tile& tile,
                                               const Add& add) {
  const int lane = threadIdx.x % 32, kv_head = head / (args.heads / args.heads_kv);
  const Lines score_lines = lines_of(args.scores, batch, head, tile);
  for (int first = 0; first < args.tokens; first += 16) {
    Step step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int wanted = first + lane % 4 * 4 + i, t = geometry::lo(wanted, args.tokens - 1);
      step.columns[i] = values(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}}));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Token row = tile.position(lane / 4 + 8 * r);
        step.scores[r][i] = wanted < args.tokens ? values(args.scores, score_lines.at(row))[kWindowSlots + t] : 0;
      }
    }
    add(step);
  }
}

__device__ __forceinline__ void sum_tile(const UnfusedArgs& args, int batch, int row_head, const Tile& tile) {
  const Rows& target = kRowsAreKeys ? args.keys : args.rows;
  const Lines lines = lines_of(target, batch, row_head, tile);
  const int lane = threadIdx.x % 32, heads = kRowsAreKeys ? args.heads / args.heads_kv : 1;
  bool good = true;
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    Results results;
    const auto add = [&](const Step& step) { results.add(step, group); };
    for (int h = 0; h < heads; ++h)
      for_each_step(args, batch, kRowsAreKeys ? row_head * heads + h : row_head, tile, add);
    if (!kRowsAreKeys) for_each_token(args, batch, row_head, tile, add);
    good = good && results.all_finite();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane / 4 + 8 * half;
      if (tile.has(r)) results.store(targets(target, lines.at(tile.position(r))), half, group);
    }
  }
  if (__all_sync(~0u, good)) return;
  __syncwarp();
#pragma unroll 1
  for (int r = 0; r < kTileRows; ++r) {
    if (!tile.has(r)) continue;
    const Token at = tile.token(tile.position(r));
    if (kRowsAreKeys) sum_to_key(args, batch, row_head, at);
    else sum_to_query(args, batch, row_head, at);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    unfused_tile_sums(const __grid_constant__ UnfusedArgs args) {
  for_each_tile(args, kRowsAreKeys ? args.heads_kv : args.heads,
                [&](int batch, int head, const Tile& tile) { sum_tile(args, batch, head, tile); });
}

}  // namespace vicus::gpu
