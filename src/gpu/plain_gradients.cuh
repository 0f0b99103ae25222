// Gradients of logits, for the backward kernels: rows and columns as in plain_tiles.cuh. Probabilities come again from the
// logsumexp of the forward call:
//   p = exp2(logit - lse / ln 2),  ds = p (grad_output . value - delta)
// Constants of the prologue: kDepth == kWide.
#pragma once

#include "plain_tiles.cuh"

namespace vicus::gpu {

constexpr int kParts = (kHeadDim + kDepth - 1) / kDepth;
constexpr int kPartsV = (kHeadDimV + kDepth - 1) / kDepth;
constexpr bool kResident = kParts == 1 && kPartsV == 1;  // tiles hold whole rows
constexpr int kTileStride = kDepth + kPad;

static_assert(kDepth == kWide);

// The numbers of a query: logsumexp in powers of two, and delta.
struct QueryNumbers {
  Acc lse, delta;
};

__device__ __forceinline__ QueryNumbers numbers_of(const PlainBackwardArgs& args, const Placed& lse,
                                                   const Placed& delta, const Position& q, int head) {
  const Acc natural = static_cast<const Acc*>(args.forward.logsumexp.data)[lse.row(q, head)];
  // A query without keys, or with nothing but -inf: its probabilities are 0.
  return {natural == -kInfinity ? kInfinity : natural * kLog2OfE,
          static_cast<const Acc*>(args.delta.data)[delta.row(q, head)]};
}

// Logits to probabilities, and products of grad_output and values to gradients of logits; 0 where a pair is not seen, or
// hidden with `careful`. `numbers(i, j)` are those of the query of a pair.
template <class NumbersOf>
__device__ __forceinline__ void make_gradients(const NumbersOf& numbers, bool careful, Scores& scores,
                                               Scores& products) {
  const Acc nothing = careful ? hidden_weight<Acc>() : 0;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      const QueryNumbers q = numbers(i, j);
      const bool hidden = scores[i][j] == -kInfinity;
      const Acc p = exp2_of(scores[i][j] - q.lse);
      const Acc ds = p * (products[i][j] - q.delta);
      scores[i][j] = hidden ? nothing : p;
      products[i][j] = hidden ? nothing : ds;
    }
  }
}

}  // namespace vicus::gpu
