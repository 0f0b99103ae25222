// Rows of gradients that are done again because a value that is not finite came near. Of engine sm90, without biases.
// Constants of the prologue, besides those of tiles.cuh: kHeadDim, kHeadDimV, kAdditional.
#pragma once

#include "tiles.cuh"

namespace vicus::gpu {

// One row, of a query or a key, by the whole warp, column after column, reading only what it sees: where a value that is
// not finite lies in a tile, products with weight zero are not zero. Slow, and rare. `head` is of queries or of keys.
template <bool kOfKey>
__device__ __forceinline__ void careful_gradients(const BackwardArgs& args, const Cell& cell, int head,
                                                  const Position& row) {
  const int lane = threadIdx.x % 32, group = args.heads / args.heads_kv;
  const int first_head = kOfKey ? head * group : head, kv_head = kOfKey ? head : head / group;
  constexpr int kParts = (kHeadDim + 31) / 32, kValueParts = (kHeadDimV + 31) / 32;
  // Strides stay in the constant memory of the arguments: registers are few.
  const auto token = [&](const Position& p, int first) {
    RowIndex at = {cell.batch, 0, {0, 0, 0}};
    for (int a = kFirstAxis; a < 3; ++a) at.token[a] = p.at[a] * kDilation[a] + cell.residue[a];
    at.token[2] += first;
    return at;
  };
  const auto data = [](const Rows& t, RowIndex at, int h) {
    at.head = h;
    return static_cast<const u16*>(t.data) + at.of(t);
  };
  float first_out[kParts] = {}, second_out[kValueParts] = {};
  // A pair: where a query is, and rows of key and value.
  const auto visit = [&](const RowIndex& at, int h, const u16* key, const u16* value) {
    const u16 *const query = data(args.query, at, h), *const grad = data(args.grad_output, at, h);
    RowIndex of_head = at;
    of_head.head = h;
    const float* const of = static_cast<const float*>(args.statistics.data) + of_head.of(args.statistics);
    float s = 0, dp = 0;
#pragma unroll 1
    for (int d = lane; d < kHeadDim; d += 32) s += Half::unpack(query[d]) * Half::unpack(key[d]);
#pragma unroll 1
    for (int d = lane; d < kHeadDimV; d += 32) dp += Half::unpack(grad[d]) * Half::unpack(value[d]);
    for (int step = 16; step > 0; step /= 2) {
      s += __shfl_xor_sync(~0u, s, step);
      dp += __shfl_xor_sync(~0u, dp, step);
    }
    const float weight = exp2_approx(s * args.scale_log2 - of[0]), ds = weight * (dp - of[1]);
    const u16* const first = kOfKey ? query : key;
    for (int i = 0; i < kParts; ++i) {
      const int f = lane + 32 * i;
      if (f < kHeadDim) first_out[i] += ds * Half::unpack(first[f]);
    }
    for (int i = 0; i < kValueParts && kOfKey; ++i) {
      const int f = lane + 32 * i;
      if (f < kHeadDimV) second_out[i] += weight * Half::unpack(grad[f]);
    }
  };
  Box seen;
  for (int a = 0; a < 3; ++a) {
    const Axis axis = axis_of(cell, a);
    const Span one = {row.at[a], row.at[a] + 1};
    seen.axis[a] = a < kFirstAxis ? Span{0, 1} : kOfKey ? geometry::queries_of(axis, one) : geometry::hull(axis, one);
  }
  for (int h = first_head; h < first_head + (kOfKey ? group : 1); ++h) {
    Position c;
    for (c.at[0] = seen.axis[0].begin; c.at[0] < seen.axis[0].end; ++c.at[0]) {
      for (c.at[1] = seen.axis[1].begin; c.at[1] < seen.axis[1].end; ++c.at[1]) {
#pragma unroll 1
        for (c.at[2] = seen.axis[2].begin; c.at[2] < seen.axis[2].end; ++c.at[2]) {
          const Position &q = kOfKey ? c : row, &k = kOfKey ? row : c;
          const RowIndex key = token(k, cell.first_key);
          visit(token(q, cell.first_query), h, data(args.key, key, kv_head), data(args.value, key, kv_head));
        }
      }
    }
    if constexpr (kAdditional && !kOfKey) {
#pragma unroll 1
      for (int t = 0; t < args.additional; ++t) {
        const RowIndex more = {cell.batch, 0, {0, 0, t}};
        visit(token(row, cell.first_query), h, data(args.additional_keys, more, kv_head),
              data(args.additional_values, more, kv_head));
      }
    }
  }
  const auto store = [&](const Rows& to, const float* sums, int width, float factor) {
    if (to.data == nullptr) return;
    u16* out = static_cast<u16*>(to.data) + place(to, cell, kOfKey ? cell.first_key : cell.first_query).row(row, head);
    for (int f = lane; f < width; f += 32) out[f] = static_cast<u16>(Half::pack(sums[f / 32] * factor, 0.0f));
  };
  store(kOfKey ? args.grad_key : args.grad_query, first_out, kHeadDim, args.scale_log2 * 0.693147180559945309f);
  if constexpr (kOfKey) store(args.grad_value, second_out, kHeadDimV, 1.0f);
}

}  // namespace vicus::gpu
