// Rows that are done again because a value that is not finite came near.
#pragma once

#include "bias.cuh"

namespace vicus::gpu {

// The output of one query by the whole warp, key after key, reading only what it sees: where a value that is not finite
// lies in a key tile, products with weight zero are not zero. Slow, and rare. Lane l gets features l, l + 32, ...; all get
// the logsumexp.
struct CarefulRow {
  static constexpr int kParts = (kHeadDimV + 31) / 32;
  float out[kParts], logsumexp;

  template <class Store>
  __device__ __forceinline__ void each(const Store& store) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int f = threadIdx.x % 32 + 32 * i;
      if (f < kHeadDimV) store(f, out[i]);
    }
  }
};

// Of the keys in `seen` and of the additional tokens in `additional`.
__device__ __forceinline__ CarefulRow careful_row_of(const ForwardArgs& args, const Cell& cell, int head, int kv_head,
                                                     const Position& q, const Box& seen, const Span& additional) {
  const int lane = threadIdx.x % 32;
  const u16* query = static_cast<const u16*>(args.query.data) + place(args.query, cell, cell.first_query).row(q, head);
  CarefulRow row = {};
  float top = -1.0f / 0.0f, sum = 0;
  const auto visit = [&](const u16* key, const u16* value, float bias) {
    float dot = 0;
    for (int d = lane; d < kHeadDim; d += 32) dot += Half::unpack(query[d]) * Half::unpack(key[d]);
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    const float s = dot * args.scale_log2 + bias;
    const float now = s != s ? s : fmaxf(top, s);
    if (now == -1.0f / 0.0f) return;
    const float factor = top == -1.0f / 0.0f ? 0.0f : exp2_approx(top - now);
    const float w = exp2_approx(s - now);
    sum = sum * factor + w;
    top = now;
    for (int i = 0; i < CarefulRow::kParts; ++i) {
      const int f = lane + 32 * i;
      if (f < kHeadDimV) row.out[i] = row.out[i] * factor + w * Half::unpack(value[f]);
    }
  };
  const Placed keys = place(args.key, cell, cell.first_key), values = place(args.value, cell, cell.first_key);
  Position k;
  for (k.at[0] = seen.axis[0].begin; k.at[0] < seen.axis[0].end; ++k.at[0]) {
    for (k.at[1] = seen.axis[1].begin; k.at[1] < seen.axis[1].end; ++k.at[1]) {
      for (k.at[2] = seen.axis[2].begin; k.at[2] < seen.axis[2].end; ++k.at[2]) {
        const float bias = kBiasKind == kBiasNone ? 0.0f : bias_at(args, bias_row(args, cell, head, q), k);
        if (kBiasKind == kBiasAdditive && bias == -1.0f / 0.0f) continue;
        visit(static_cast<const u16*>(args.key.data) + keys.row(k, kv_head),
              static_cast<const u16*>(args.value.data) + values.row(k, kv_head), bias);
      }
    }
  }
  if constexpr (kAdditional) {
    const Placed more_keys = place_additional(args.additional_keys, cell);
    const Placed more_values = place_additional(args.additional_values, cell);
    for (int t = additional.begin; t < additional.end; ++t) {
      const Position p = {{0, 0, t}};
      visit(static_cast<const u16*>(args.additional_keys.data) + more_keys.row(p, kv_head),
            static_cast<const u16*>(args.additional_values.data) + more_values.row(p, kv_head), 0.0f);
    }
  }
  for (float& x : row.out) x = sum == 0 ? 0.0f : x / sum;
  row.logsumexp = sum == 0 ? -1.0f / 0.0f : (top + log2_approx(sum)) * 0.693147180559945f;
  return row;
}

// The keys that one query sees.
__device__ __forceinline__ Box seen_by(const Cell& cell, const Position& q) {
  Box seen;
  for (int a = 0; a < 3; ++a) {
    seen.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::window(cell.grid.axis[a], q.at[a]);
  }
  return seen;
}

// One query's rows of the output and the logsumexp.
__device__ __forceinline__ void careful_query(const ForwardArgs& args, const Cell& cell, int head, int kv_head,
                                              const Position& q) {
  const CarefulRow row = careful_row_of(args, cell, head, kv_head, q, seen_by(cell, q), {0, args.additional});
  u16* output = static_cast<u16*>(args.output.data) + place(args.output, cell, cell.first_query).row(q, head);
  row.each([&](int f, float x) { output[f] = static_cast<u16>(Half::pack(x, 0.0f)); });
  if (kLogsumexp && threadIdx.x % 32 == 0) {
    static_cast<float*>(args.logsumexp.data)[place(args.logsumexp, cell, cell.first_query).row(q, head)] =
        row.logsumexp;
  }
}

}  // namespace vicus::gpu
