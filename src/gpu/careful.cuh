// Rows that are done again because a value that is not finite came near.
#pragma once

#include "bias.cuh"

namespace vicus::gpu {

// The output of one query by the whole warp, key after key, reading only what it sees: where a value that is not finite
// lies in a key tile, products with weight zero are not zero. Slow, and rare. Lane l gets features l, l + 32, ....
struct CarefulRow {
  static constexpr int kParts = (kHeadDimV + 31) / 32;
  const ForwardArgs& args;
  const Cell& cell;
  const int head, kv_head;
  const Position q;
  float out[kParts] = {}, top = -kInfinite, sum = 0;

  __device__ __forceinline__ void visit(const u16* query, const u16* key, const u16* value, float bias) {
    const int lane = threadIdx.x % 32;
    float dot = 0;
    for (int d = lane; d < kHeadDim; d += 32) dot += Half::unpack(query[d]) * Half::unpack(key[d]);
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    const float s = dot * args.scale_log2 + bias;
    const float now = s != s ? s : fmaxf(top, s);
    if (now == -kInfinite) return;
    const float factor = top == -kInfinite ? 0.0f : exp2_approx(top - now);
    const float w = exp2_approx(s - now);
    sum = sum * factor + w;
    top = now;
    for (int i = 0; i < kParts; ++i) {
      const int f = lane + 32 * i;
      if (f < kHeadDimV) out[i] = out[i] * factor + w * Half::unpack(value[f]);
    }
  }

  __device__ __forceinline__ const u16* query() const {
    return static_cast<const u16*>(args.query.data) + place(args.query, cell, cell.first_query).row(q, head);
  }

  // The keys in `seen`.
  __device__ __forceinline__ void add(const Box& seen) {
    const u16* const row = query();
    const Placed keys = place(args.key, cell, cell.first_key), values = place(args.value, cell, cell.first_key);
    Position k;
    for (k.at[0] = seen.axis[0].begin; k.at[0] < seen.axis[0].end; ++k.at[0]) {
      for (k.at[1] = seen.axis[1].begin; k.at[1] < seen.axis[1].end; ++k.at[1]) {
        for (k.at[2] = seen.axis[2].begin; k.at[2] < seen.axis[2].end; ++k.at[2]) {
          const float bias = kBiasKind == kBiasNone ? 0.0f : bias_at(args, bias_row(args, cell, head, q), k);
          if (kBiasKind == kBiasAdditive && bias == -kInfinite) continue;
          visit(row, static_cast<const u16*>(args.key.data) + keys.row(k, kv_head),
                static_cast<const u16*>(args.value.data) + values.row(k, kv_head), bias);
        }
      }
    }
  }

  __device__ __forceinline__ void add_additional(const Span& tokens) {
    const u16* const row = query();
    const Placed keys = place_additional(args.additional_keys, cell);
    const Placed values = place_additional(args.additional_values, cell);
    for (int t = tokens.begin; t < tokens.end; ++t) {
      const Position p = {{0, 0, t}};
      visit(row, static_cast<const u16*>(args.additional_keys.data) + keys.row(p, kv_head),
            static_cast<const u16*>(args.additional_values.data) + values.row(p, kv_head), 0.0f);
    }
  }

  // The output feature by feature, after the last key. Returns the logsumexp.
  template <class Store>
  __device__ __forceinline__ float finish(const Store& store) const {
    const float factor = sum == 0 ? 0.0f : reciprocal_approx(sum);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int f = threadIdx.x % 32 + 32 * i;
      if (f < kHeadDimV) store(f, out[i] * factor);
    }
    return sum == 0 ? -kInfinite : (top + log2_approx(sum)) * 0.693147180559945f;
  }
};

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
  CarefulRow row{args, cell, head, kv_head, q};
  row.add(seen_by(cell, q));
  if constexpr (kAdditional) row.add_additional({0, args.additional});
  u16* output = static_cast<u16*>(args.output.data) + place(args.output, cell, cell.first_query).row(q, head);
  const float lse = row.finish([&](int f, float x) { output[f] = static_cast<u16>(Half::pack(x, 0.0f)); });
  if (kLogsumexp && threadIdx.x % 32 == 0) {
    static_cast<float*>(args.logsumexp.data)[place(args.logsumexp, cell, cell.first_query).row(q, head)] = lse;
  }
}

}  // namespace vicus::gpu
