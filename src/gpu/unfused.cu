// The unfused operators: scores of every query with the keys of its window in memory, one slot each (row-major over the
// window, then the additional tokens), and sums by them. Every result has one owner, which gathers; sums run in one order.
//
//   unfused_scores         scores = rows . keys (+ bias)         qk forward, av backward for scores     a warp per query
//   unfused_to_queries     rows = sum of scores * keys           av forward, qk backward for queries    a warp per query
//   unfused_to_keys        keys = sum of scores * rows           backward for keys and values           a warp per key
//   unfused_to_additional  the same for the additional tokens                                           a block per token
//   unfused_to_bias        bias = sum of scores                                                         a block per entry
//
// Grids: a warp per token along x, [B, H] (keys: [B, Hkv]) along y as far as it goes; blocks over [B, Hkv, T] and over
// [H, 2 w0 - 1, ...], last fastest.
//
// Constants of the prologue: those of plain_elements.cuh, kRank, kHeadDim, kWindow, kStep, kCausal, kDilation, kBiasType
// (of what unfused_scores reads and unfused_to_bias writes), kWarps.
#include "plain_elements.cuh"
#include "unfused_args.h"
#include "vicus/geometry.h"

namespace vicus::gpu {

using geometry::Box;
using geometry::Span;

constexpr int kThreads = kWarps * 32;
constexpr int kFirstAxis = 3 - kRank;
constexpr long long kWindowSlots = static_cast<long long>(kWindow[0]) * kWindow[1] * kWindow[2];
constexpr int kDotLanes = 8;                                            // lanes of a dot product
constexpr int kColumns = (kHeadDim + 32 * kPiece - 1) / (32 * kPiece);  // pieces of a lane when a warp has a row
constexpr int kSlice = kColumns < 4 ? kColumns : 4;                     // of them at a time

struct Token {
  int at[3];
};

// A position of a residue class.
struct Place {
  geometry::Grid grid;
  int residue[3], at[3];
  __device__ __forceinline__ Token token(int i, int j, int k) const {
    return {{geometry::token_of(i, kDilation[0], residue[0]), geometry::token_of(j, kDilation[1], residue[1]),
             geometry::token_of(k, kDilation[2], residue[2])}};
  }
};

__device__ __forceinline__ Place place_of(const UnfusedArgs& args, const Token& t) {
  Place p;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    p.residue[a] = t.at[a] % kDilation[a];
    p.at[a] = t.at[a] / kDilation[a];
    p.grid.axis[a] = geometry::neighborhood_axis(geometry::class_len(args.len[a], kDilation[a], p.residue[a]),
                                                 kWindow[a], kStep[a], kCausal[a]);
  }
  return p;
}

__device__ __forceinline__ Box window_of(const Place& p, int i, int j, int k) {
  return {
      {geometry::window(p.grid.axis[0], i), geometry::window(p.grid.axis[1], j), geometry::window(p.grid.axis[2], k)}};
}

__device__ __forceinline__ long long row_of(const Rows& t, int batch, int head, const Token& at) {
  return batch * t.batch + head * t.head + at.at[0] * t.token[0] + at.at[1] * t.token[1] + at.at[2] * t.token[2];
}
__device__ __forceinline__ const Storage* values(const Rows& t, long long offset) {
  return static_cast<const Storage*>(t.data) + offset;
}
__device__ __forceinline__ Storage* targets(const Rows& t, long long offset) {
  return static_cast<Storage*>(t.data) + offset;
}

__device__ __forceinline__ u32 tokens_of(const UnfusedArgs& args) {
  return static_cast<u32>(args.len[0]) * args.len[1] * args.len[2];
}
__device__ __forceinline__ Token token_at(const UnfusedArgs& args, u32 index) {
  Token token;
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    token.at[a] = static_cast<int>(index % args.len[a]);
    index /= args.len[a];
  }
  return token;
}

// Calls `each(batch, head, token)` for what the warp has of [B, heads, *X].
template <class Each>
__device__ __forceinline__ void for_each_row(const UnfusedArgs& args, int heads, const Each& each) {
  const u32 index = blockIdx.x * static_cast<u32>(kWarps) + threadIdx.x / 32;
  if (index >= tokens_of(args)) return;
  const Token token = token_at(args, index);
  for (int y = blockIdx.y; y < args.batch * heads; y += gridDim.y) each(y / heads, y % heads, token);
}

// kSlice pieces of a row in a warp: piece i of slice s begins at column ((s * kSlice + i) * 32 + lane) * kPiece.
struct Sums {
  Acc at[kSlice][kPiece] = {};
  static __device__ __forceinline__ int column(int slice, int i) {
    return ((slice * kSlice + i) * 32 + static_cast<int>(threadIdx.x) % 32) * kPiece;
  }
  __device__ __forceinline__ void add(const Storage* row, Acc weight, int slice) {
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
      const int first = column(slice, i);
      if (first >= kHeadDim) continue;
      Acc x[kPiece];
      load_values(row + first, x);
#pragma unroll
      for (int v = 0; v < kPiece; ++v) at[i][v] += weight * x[v];
    }
  }
};

__device__ __forceinline__ void store_sums(const Acc (&at)[kSlice][kPiece], Storage* row, int slice) {
#pragma unroll
  for (int i = 0; i < kSlice; ++i) {
    const int first = Sums::column(slice, i);
    if (first < kHeadDim) store_values(row + first, at[i]);
  }
}

__device__ __forceinline__ void score_query(const UnfusedArgs& args, int batch, int head, const Token& at) {
  const int kv_head = head / (args.heads / args.heads_kv);
  const Place q = place_of(args, at);
  const Box window = window_of(q, q.at[0], q.at[1], q.at[2]);
  const Storage* row = values(args.rows, row_of(args.rows, batch, head, at));
  Storage* scores = targets(args.scores, row_of(args.scores, batch, head, at));
  const int group = threadIdx.x % 32 / kDotLanes;
  const bool writer = threadIdx.x % kDotLanes == 0;
  for (long long slot = group; slot < kWindowSlots; slot += 32 / kDotLanes) {
    const int k = static_cast<int>(slot % kWindow[2]), j = static_cast<int>(slot / kWindow[2] % kWindow[1]);
    const int i = static_cast<int>(slot / kWindow[2] / kWindow[1]);
    if (i >= window.axis[0].size() || j >= window.axis[1].size() || k >= window.axis[2].size()) {
      if (writer) scores[slot] = Values::store(args.zero_unused ? 0 : -kInfinity);
      continue;
    }
    const int key[3] = {window.axis[0].begin + i, window.axis[1].begin + j, window.axis[2].begin + k};
    const Token token = q.token(key[0], key[1], key[2]);
    Acc s = dot_rows<kHeadDim, kDotLanes>(row, values(args.keys, row_of(args.keys, batch, kv_head, token)));
    if (!writer) continue;
    if (args.bias.data != nullptr) {
      long long index = head * args.bias.head;
#pragma unroll
      for (int a = kFirstAxis; a < 3; ++a) index += (key[a] - q.at[a] + kWindow[a] - 1) * args.bias.axis[a];
      s += load_typed<kBiasType>(args.bias.data, index);
    }
    scores[slot] = Values::store(s);
  }
  for (int t = group; t < args.tokens; t += 32 / kDotLanes) {
    const Acc s = dot_rows<kHeadDim, kDotLanes>(
        row, values(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}})));
    if (writer) scores[kWindowSlots + t] = Values::store(s);
  }
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_scores(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads, [&](int batch, int head, const Token& at) { score_query(args, batch, head, at); });
}

__device__ __forceinline__ void sum_to_query(const UnfusedArgs& args, int batch, int head, const Token& at) {
  const int kv_head = head / (args.heads / args.heads_kv);
  const Place q = place_of(args, at);
  const Box window = window_of(q, q.at[0], q.at[1], q.at[2]);
  const Storage* scores = values(args.scores, row_of(args.scores, batch, head, at));
  Storage* out = targets(args.rows, row_of(args.rows, batch, head, at));
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int i = window.axis[0].begin; i < window.axis[0].end; ++i) {
      for (int j = window.axis[1].begin; j < window.axis[1].end; ++j) {
        const long long line =
            (static_cast<long long>(i - window.axis[0].begin) * kWindow[1] + j - window.axis[1].begin) * kWindow[2] -
            window.axis[2].begin;
#pragma unroll 4
        for (int k = window.axis[2].begin; k < window.axis[2].end; ++k) {
          sums.add(values(args.keys, row_of(args.keys, batch, kv_head, q.token(i, j, k))),
                   Values::load(scores[line + k]), slice);
        }
      }
    }
    for (int t = 0; t < args.tokens; ++t) {
      sums.add(values(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}})),
               Values::load(scores[kWindowSlots + t]), slice);
    }
    store_sums(sums.at, out, slice);
  }
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_queries(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads, [&](int batch, int head, const Token& at) { sum_to_query(args, batch, head, at); });
}

__device__ __forceinline__ void sum_to_key(const UnfusedArgs& args, int batch, int kv_head, const Token& at) {
  const int group = args.heads / args.heads_kv;
  const Place k = place_of(args, at);
  Box queries;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    queries.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::queries_of(k.grid.axis[a], {k.at[a], k.at[a] + 1});
  }
  Storage* out = targets(args.keys, row_of(args.keys, batch, kv_head, at));
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int i = queries.axis[0].begin; i < queries.axis[0].end; ++i) {
        const long long plane = k.at[0] - geometry::window(k.grid.axis[0], i).begin;
        for (int j = queries.axis[1].begin; j < queries.axis[1].end; ++j) {
          const long long line = plane * kWindow[1] + k.at[1] - geometry::window(k.grid.axis[1], j).begin;
#pragma unroll 4
          for (int n = queries.axis[2].begin; n < queries.axis[2].end; ++n) {
            const long long slot = line * kWindow[2] + k.at[2] - geometry::window(k.grid.axis[2], n).begin;
            const Token token = k.token(i, j, n);
            sums.add(values(args.rows, row_of(args.rows, batch, head, token)),
                     Values::load(*values(args.scores, row_of(args.scores, batch, head, token) + slot)), slice);
          }
        }
      }
    }
    store_sums(sums.at, out, slice);
  }
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_keys(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads_kv, [&](int batch, int head, const Token& at) { sum_to_key(args, batch, head, at); });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    unfused_to_additional(const __grid_constant__ UnfusedArgs args) {
  __shared__ Acc scratch[kWarps][kSlice][kPiece][32];
  const int t = static_cast<int>(blockIdx.x) % args.tokens, rest = static_cast<int>(blockIdx.x) / args.tokens;
  const int kv_head = rest % args.heads_kv, batch = rest / args.heads_kv, group = args.heads / args.heads_kv;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int slice = 0; slice * kSlice < kColumns; ++slice) {
    Sums sums;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
#pragma unroll 4
      for (u32 i = warp; i < tokens_of(args); i += kWarps) {
        const Token at = token_at(args, i);
        const Storage weight = *values(args.scores, row_of(args.scores, batch, head, at) + kWindowSlots + t);
        sums.add(values(args.rows, row_of(args.rows, batch, head, at)), Values::load(weight), slice);
      }
    }
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
      for (int v = 0; v < kPiece; ++v) scratch[warp][i][v][lane] = sums.at[i][v];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < kSlice; ++i) {
        for (int v = 0; v < kPiece; ++v) {
          Acc total = 0;
          for (int w = 0; w < kWarps; ++w) total += scratch[w][i][v][lane];
          sums.at[i][v] = total;
        }
      }
      store_sums(sums.at, targets(args.additional, row_of(args.additional, batch, kv_head, {{0, 0, t}})), slice);
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_bias(const __grid_constant__ UnfusedArgs args) {
  __shared__ double scratch[kWarps];
  long long entry = blockIdx.x, out = 0;
  int distance[3] = {0, 0, 0};
#pragma unroll
  for (int a = 2; a >= kFirstAxis; --a) {
    const int at = static_cast<int>(entry % (2 * kWindow[a] - 1));
    entry /= 2 * kWindow[a] - 1;
    distance[a] = at - (kWindow[a] - 1);
    out += at * args.bias.axis[a];
  }
  const int head = static_cast<int>(entry);
  double sum = 0;
  for (int batch = 0; batch < args.batch; ++batch) {
    for (u32 i = threadIdx.x; i < tokens_of(args); i += kThreads) {
      const Token at = token_at(args, i);
      const Place q = place_of(args, at);
      long long slot = 0;
      bool seen = true;
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        const Span window = geometry::window(q.grid.axis[a], q.at[a]);
        const int key = q.at[a] + distance[a];
        seen = seen && window.contains(key);
        slot = slot * kWindow[a] + key - window.begin;
      }
      if (seen) sum += Values::load(*values(args.scores, row_of(args.scores, batch, head, at) + slot));
    }
  }
  sum = sum_over_block(sum, scratch);
  if (threadIdx.x == 0) store_typed<kBiasType>(args.bias.data, out + head * args.bias.head, sum);
}

}  // namespace vicus::gpu
