// Merging of partial attentions: one pass over the parts, bound by memory. With w_i = exp(lse_i - lse):
//   lse = log sum_i exp(lse_i),  o = sum_i w_i o_i,  do_i = w_i do,  dlse_i = w_i (do . o_i - do . o + dlse)
// A part that saw no key (lse_i = -inf) has weight 0 whatever its output holds.
//
// Constants of the prologue: those of plain_elements.cuh, kHeadDimV, kLanes (of a row, a power of two up to 32), kWarps.
#pragma once

#include "merge_args.h"
#include "plain_elements.cuh"

namespace vicus::gpu {

constexpr int kThreads = kWarps * 32;

struct Row {
  int batch, head, at[3];
  __device__ __forceinline__ long long offset(const Rows& t) const {
    return batch * t.batch + head * t.head + at[0] * t.token[0] + at[1] * t.token[1] + at[2] * t.token[2];
  }
};

// Calls `each(row, index)` for the rows of this group of lanes; rows of a batch entry along x, batch along y as far as it
// goes.
template <class Each>
__device__ __forceinline__ void for_each_row(const MergeArgs& args, const Each& each) {
  const u32 rows = static_cast<u32>(args.len[0]) * args.len[1] * args.len[2] * args.heads;
  const u32 index = blockIdx.x * static_cast<u32>(kThreads / kLanes) + threadIdx.x / kLanes;
  if (index >= rows) return;
  Row row;
  row.head = static_cast<int>(index % args.heads);
  u32 rest = index / args.heads;
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    row.at[a] = static_cast<int>(rest % args.len[a]);
    rest /= args.len[a];
  }
  for (row.batch = blockIdx.y; row.batch < args.batch; row.batch += gridDim.y) {
    each(row, static_cast<long long>(row.batch) * rows + index);
  }
}

__device__ __forceinline__ const Storage* values(const Rows& t, const Row& row) {
  return static_cast<const Storage*>(t.data) + row.offset(t);
}
__device__ __forceinline__ Storage* targets(const Rows& t, const Row& row) {
  return static_cast<Storage*>(t.data) + row.offset(t);
}
__device__ __forceinline__ Acc number(const Rows& t, const Row& row) {
  return static_cast<const Acc*>(t.data)[row.offset(t)];
}

// Sums over parts: of exp(lse_i - top), and of that times grad_output . output_i. A NaN among the logsumexps stays.
struct PartSums {
  Acc top = -kInfinity, sum = 0, dot = 0;
  __device__ __forceinline__ void add(Acc lse, Acc product) {
    if (lse == -kInfinity) return;
    const Acc now = lse > top || lse != lse ? lse : top;
    const Acc old_factor = top == -kInfinity ? 0 : exp2_of((top - now) * kLog2OfE);
    const Acc factor = exp2_of((lse - now) * kLog2OfE);
    sum = sum * old_factor + factor;
    dot = dot * old_factor + factor * product;
    top = now;
  }
  // Weight of a part in the whole.
  __device__ __forceinline__ Acc weight(Acc lse) const {
    if (top != top) return top;
    return lse == -kInfinity ? 0 : exp2_of((lse - top) * kLog2OfE) / sum;
  }
};

__device__ __forceinline__ Acc grad_dot_output(const MergeArgs& args, const Row& row, int part) {
  return dot_rows<kHeadDimV, kLanes>(values(args.grad_output, row), values(args.outputs[part], row));
}

__device__ __forceinline__ void add_parts(const MergeArgs& args, const Row& row, PartSums& sums) {
  for (int i = 0; i < args.parts; ++i) {
    const Acc lse = number(args.logsumexps[i], row);
    if (lse != -kInfinity) sums.add(lse, grad_dot_output(args, row, i));
  }
}

}  // namespace vicus::gpu
