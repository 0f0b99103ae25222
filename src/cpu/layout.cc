#include "cpu/layout.h"

#include <algorithm>

#include "cpu/tiles.h"

namespace vicus::cpu {

ForwardLayout::ForwardLayout(const Problem& p, const ForwardPlan& plan) {
  const std::size_t element = element_bytes(p.dtype);
  const auto rows = static_cast<std::size_t>(plan.tile.rows);
  const auto keys_packed = static_cast<std::size_t>(plan.pack_keys);
  const auto chunk = static_cast<std::size_t>(plan.chunk_keys);
  const auto d = static_cast<std::size_t>(p.head_dim);
  const auto dv = static_cast<std::size_t>(p.head_dim_v);
  std::size_t tiles = 1;  // a rolling stack works on one after the other
  if (plan.roll_axis < 0) {
    tiles = static_cast<std::size_t>(plan.stack_heads);
    for (const int n : plan.stack) tiles *= static_cast<std::size_t>(n);
  }
  const bool biased = p.rpb || p.attn_bias;
  Carver carver;
  value_width = round_up(dv, kPad);
  query_step = round_up(d, kPad) * rows * element;
  out_step = round_up(dv, 4) * rows * element;
  row_step = rows * element;
  query = carver.take(tiles * query_step);
  out = carver.take(tiles * out_step);
  top = carver.take(tiles * row_step);
  sum = carver.take(tiles * row_step);
  keys = carver.take(static_cast<std::size_t>(blocks(p.head_dim)) * keys_packed * kBlock * element);
  values = carver.take(keys_packed * value_width * element);
  scores = carver.take(chunk * rows * element);
  bias = carver.take(biased ? chunk * rows * element : 0);
  factor = carver.take(row_step);
  masks = carver.take(keys_packed * sizeof(std::uint64_t));
  axis_masks = carver.take((keys_packed + 2) * sizeof(std::uint64_t));
  runs = carver.take(keys_packed * sizeof(Run));
  bytes = carver.bytes();
}

BackwardLayout::BackwardLayout(const Problem& p, const BackwardPlan& plan, std::int64_t tiles) {
  const std::size_t element = element_bytes(p.dtype);
  const auto rows = static_cast<std::size_t>(plan.tile.rows);
  const auto chunk = static_cast<std::size_t>(plan.chunk_keys);
  // Key blocks of small residue classes are small; additional tokens go in blocks of at least 64.
  const std::size_t kv =
      std::max(static_cast<std::size_t>(plan.kv_block[0]) * static_cast<std::size_t>(plan.kv_block[1]) *
                   static_cast<std::size_t>(plan.kv_block[2]),
               static_cast<std::size_t>(std::min<std::int64_t>(p.additional_tokens, 64)));
  capacity = kv;
  const std::size_t row_bytes = kBlock * element;
  const auto d_blocks = static_cast<std::size_t>(blocks(p.head_dim));
  const auto dv_blocks = static_cast<std::size_t>(blocks(p.head_dim_v));
  const bool biased = p.rpb || p.attn_bias;
  Carver carver;
  grad_query_step = round_up(static_cast<std::size_t>(p.head_dim), 4) * rows * element;
  grad_query = carver.take(static_cast<std::size_t>(tiles) * grad_query_step);
  keys = carver.take(d_blocks * kv * row_bytes);
  values = carver.take(dv_blocks * kv * row_bytes);
  grad_keys = carver.take(d_blocks * kv * row_bytes);
  grad_values = carver.take(dv_blocks * kv * row_bytes);
  query_rows = carver.take(d_blocks * rows * row_bytes);
  query = carver.take(round_up(static_cast<std::size_t>(p.head_dim), kPad) * rows * element);
  grad_out_rows = carver.take(dv_blocks * rows * row_bytes);
  grad_out = carver.take(round_up(static_cast<std::size_t>(p.head_dim_v), kPad) * rows * element);
  tile_step = plan.keep_queries ? carver.bytes() - query_rows : 0;
  carver.take(static_cast<std::size_t>(tiles - 1) * tile_step);
  loaded = carver.take(static_cast<std::size_t>(tiles));
  row_step = rows * element;
  lse = carver.take(static_cast<std::size_t>(tiles) * row_step);
  delta = carver.take(static_cast<std::size_t>(tiles) * row_step);
  scores = carver.take(chunk * rows * element);
  grad_scores = carver.take(chunk * rows * element);
  bias = carver.take(biased ? chunk * rows * element : 0);
  row = carver.take(row_bytes);
  masks = carver.take(kv * sizeof(std::uint64_t));
  axis_masks = carver.take((kv + 2) * sizeof(std::uint64_t));
  runs = carver.take(kv * sizeof(Run));
  bytes = carver.bytes();
}

}  // namespace vicus::cpu
