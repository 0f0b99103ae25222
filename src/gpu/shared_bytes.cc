// Shared memory of the kernels, by their texts, which assert that it is enough.
#include <algorithm>
#include <array>

#include "gpu/spec.h"
#include "vicus/geometry.h"

namespace vicus::gpu {
namespace {

using geometry::ceil_div;

// Bytes of a row of `width` features in shared memory, with 16 bytes of padding where they are needed: Layout of load.cuh.
int row_bytes(const Spec& s, int width) {
  return 2 * (padded(width) + (s.meets_parts() && padded(width) % 64 == 0 ? 0 : 8));
}

// meeting.cuh: of the `own` positions of a block's tile.
int windows_bytes(const std::array<int, 3>& own) {
  constexpr int kSpanBytes = 8;
  return 3 * std::max({own[0], own[1], own[2]}) * kSpanBytes + 16;
}

// Rows of zeros after each tile that warps meet in parts: meeting.cuh.
int spare_rows(const Spec& s, const std::array<int, 3>& tile, const std::array<int, 3>& part, bool of_keys) {
  const int met = part[0] * part[1] * part[2];
  const bool lines = part[0] * part[1] > 1 && part[2] != tile[2], planes = part[0] > 1 && part[1] != tile[1];
  return !s.meets_parts() || lines || planes || (!of_keys && met % s.chunk == 0) ? 0 : s.chunk - 1;
}

constexpr int kShared = 640;  // what one thread works out for all others

int forward_bytes(const Spec& s) {
  const int query = row_bytes(s, s.head_dim), rows = s.meets_parts() ? 16 : s.rows() * query;
  const int keys = s.keys() + spare_rows(s, s.tile_kv, s.warp_kv, false);
  return rows + s.stages * (keys * (query + row_bytes(s, s.head_dim_v)) + 16) + windows_bytes(s.tile_q) + kShared;
}

// Rows of a query and value, or key and value, take `row` bytes.
int queries_bytes(const Spec& s, int row) {
  const int rows = s.meets_parts() ? 32 : s.rows() * row;
  const int keys = s.keys() + spare_rows(s, s.tile_kv, s.warp_kv, false);
  return rows + s.stages * (keys * row + 16) + windows_bytes(s.tile_q) + kShared;
}

int keys_bytes(const Spec& s, int row) {
  const int keys = s.rows() / s.splits, step = s.chunk * s.splits;
  const int queries =
      s.meets_parts() ? s.queries() + spare_rows(s, s.tile_q, s.warp_q, true) : ceil_div(s.queries(), step) * step;
  const int exchanged = s.splits > 1 ? 2 * (s.chunk / 16) * s.row_blocks * 4 * 32 : 1;
  constexpr int kWalkBytes = 208, kStatisticsBytes = 8;
  return (s.meets_parts() ? 32 : keys * row) + s.stages * queries * (row + kStatisticsBytes) +
         2 * s.warps * 4 * (exchanged + 1) + (s.stages + 1) * kWalkBytes +
         (s.add_queries ? 2 * keys * (queries + 8) : 16) + windows_bytes({1, 1, s.keys()}) + kShared;
}

// sm90_tiles.cuh: slabs of 64 features, and what is known of tiles and rows.
int boxes_bytes(const Spec& s) {
  constexpr int kUnit = 1024, kSlabRow = 128, kBarrier = 8, kBox = 24, kSpan = 8, kJob = 64, kWalk = 20, kRows = 64;
  const int warpgroups = s.warps / 4, slabs = ceil_div(s.head_dim, 64), value_slabs = ceil_div(s.head_dim_v, 64);
  const int bytes = kSlabRow * (warpgroups * slabs * kRows + s.stages * s.keys() * (slabs + value_slabs)) +
                    kBarrier * (2 * warpgroups + 4 * s.stages) + warpgroups * 2 * kJob +
                    s.stages * (kWalk + 4 * warpgroups) + warpgroups * (2 * kBox + kRows * kSpan * s.rank) + 64;
  return ceil_div(bytes, kUnit) * kUnit;
}

// sm90_gradients.cuh: the same, and two buffers of gradients of logits; or one, and sums of dQ; or none.
int gradient_bytes(const Spec& s) {
  constexpr int kUnit = 1024, kSlabRow = 128, kBarrier = 8, kBox = 24, kSpan = 8, kWalk = 16, kRows = 64,
                kRowTile = 320;
  const int warpgroups = s.warps / 4, slabs = ceil_div(s.head_dim, 64), second_slabs = ceil_div(s.head_dim_v, 64);
  const bool of_keys = has_boxes_of_keys(s.kernel), of_values = s.kernel == Kernel::sm90_values;
  const int row_slabs = slabs + (of_values ? 0 : second_slabs);
  const int column_slabs = s.stages * slabs + (s.second_stages > 0 ? s.second_stages : s.stages) * second_slabs;
  constexpr int kSumWidth = 64, kSumRow = kSumWidth * 4 / kSlabRow;  // in rows of slabs
  const int buffer = warpgroups * ceil_div(s.keys(), 64) * kRows, sums = warpgroups * kRows * kSumRow;
  const int grads = !of_keys || s.second_stages > 0 || s.crowd() ? 0 : s.add_queries ? buffer + sums : 2 * buffer;
  const int statistics = !of_keys ? 16 : (of_values ? 4 : 8) * s.keys();
  const int bytes = kSlabRow * (row_slabs * warpgroups * kRows + column_slabs * s.keys() + grads) +
                    s.stages * (statistics + 2 * kBarrier + kWalk + 4 * warpgroups) +
                    warpgroups * (2 * kBox + (kRows + s.rank) * kSpan) + kRowTile + 256;
  return ceil_div(bytes, kUnit) * kUnit;
}

// plain_tiles.cuh: columns go to threads in groups of 8, rows are padded by 16 bytes.
int plain_bytes(const Spec& s) {
  const bool of_keys = s.kernel == Kernel::plain_keys || s.kernel == Kernel::plain_additional;
  const int number = accumulator_bytes(s.dtype), pad = number == 4 ? 8 : 2;
  const int rows = s.rows(), columns = ceil_div(of_keys ? s.queries() : s.keys(), 8) * 8;
  const int depth = s.depth + pad, wide = s.wide + pad;
  constexpr int kSpanBytes = 8, kBoxBytes = 3 * kSpanBytes;
  const int views = 8 * (s.bias_kind == BiasKind::none ? 1 : rows) + (rows + 2) * kBoxBytes;
  const int weights = rows * (columns + (number == 4 ? 4 : 8));
  if (s.kernel == Kernel::plain_forward) {
    return number * (rows * depth + columns * (depth + wide) + weights) + views;
  }
  return number * (2 * (rows + columns) * depth + weights + (of_keys ? 2 * columns : 0)) + views;
}

}  // namespace

int shared_bytes(const Spec& s) {
  switch (s.kernel) {
    case Kernel::forward:
      return forward_bytes(s);
    case Kernel::sm90_forward:
      return boxes_bytes(s);
    case Kernel::sm90_queries:
    case Kernel::sm90_keys:
    case Kernel::sm90_values:
      return gradient_bytes(s);
    case Kernel::queries:
      return queries_bytes(s, row_bytes(s, s.head_dim) + row_bytes(s, s.head_dim_v));
    case Kernel::keys:
    case Kernel::additional:
      return keys_bytes(s, row_bytes(s, s.head_dim) + row_bytes(s, s.head_dim_v));
    case Kernel::plain_forward:
    case Kernel::plain_queries:
    case Kernel::plain_keys:
    case Kernel::plain_additional:
      return plain_bytes(s);
    default:
      return 0;
  }
}

}  // namespace vicus::gpu
