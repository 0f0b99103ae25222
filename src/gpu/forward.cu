// Attention forward with tensor cores of sm_80 and later, for 16-bit storage: one block per tile of queries, over the key
// tiles of its hull (FlashAttention-2: Dao 2023; online softmax: Milakov and Gimelshein 2018).
//
// Warps own 16 * kRowBlocks rows each. Key tiles start where the hull starts and are boxes of kTileKv; a ring of kStages
// tiles is loaded with cp.async while the warps multiply. A tile that every query sees needs no mask; one that no query of
// a warp sees is skipped by that warp; the others are masked with the bits of key_mask. Rows lie in shared memory with 16
// bytes of padding, which keeps ldmatrix free of bank conflicts.
//
// Small windows: a warp owns a box of queries (kWarpQ) and meets only a part of each key tile, the box kWarpKv around what
// its queries see, gathered by the row addresses that ldmatrix takes from each lane. With one stage, the only tile covers
// the hull.
//
// Constants of the prologue, besides those of tiles.cuh: Half, kHeadDim, kHeadDimV, kWarps, kRowBlocks, kStages, kMinBlocks,
// kSharedBytes, kVectors (16-byte loads are legal), kPreScale (logits are scaled one by one), kAdditional, kLogsumexp,
// kBiasKind.
#include "bias.cuh"
#include "careful.cuh"
#include "meeting.cuh"

namespace vicus::gpu {

constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;  // tiles that are loaded before the first is used
constexpr float kNothing = -1.0f / 0.0f;

// What all threads of a block share about it. One thread works it out; the others read what they need when they need it,
// which takes fewer instructions and fewer registers.
struct Shared {
  BlockTiles all;
  Box hull;  // of the keys that the tile sees
  int tiles;
  Sources from;
  Placed query, output, logsumexp;
};

struct Smem {
  union {
    u16 query[kRows * kQStride];
    u16 out[kRows * kVStride];
  };
  u16 key[kStages][kKeys * kQStride];
  u16 value[kStages][kKeys * kVStride];
  Windows windows;
  KeyWalk walk[kStages];  // where the key tile of a stage is
  Shared shared;
};
static_assert(sizeof(Smem) <= kSharedBytes);

// Accumulators of a warp: block m holds rows 16 m + lane / 4 (registers 0, 1) and 8 more (2, 3), columns 8 n + 2 (lane % 4)
// and the next.
template <int kColumns>
struct Sums {
  float at[kRowBlocks][kColumns][4];
};

// scores[row][key] = query[row] . key[key]
__device__ __forceinline__ void multiply_keys(const u16* query, const u16* key, const MetRows& rows,
                                              Sums<kKeyBlocks>& scores) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int m = 0; m < kRowBlocks; ++m) {
    for (int n = 0; n < kKeyBlocks; ++n) {
      for (int i = 0; i < 4; ++i) scores.at[m][n][i] = 0;
    }
  }
  // A: rows lane % 16, columns of 8 by lane / 16. B (two blocks of 8 keys): keys lane % 8 + 8 (lane / 16), columns of 8.
  const u32 a = smem_address(query) + 2 * ((warp * kWarpRows + lane % 16) * kQStride + lane / 16 * 8);
  const u32 b = smem_address(key) + 2 * (lane / 8 % 2 * 8);
  const int of_lane = lane % 8 + lane / 16 * 8;
  const auto visit = [&](const u32(&q)[kRowBlocks][4], u32 row, int n, int d) {
    u32 k[4];
    ldmatrix_x4(k, row + 2 * d);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      Half::mma(scores.at[m][n], q[m], k[0], k[1]);
      Half::mma(scores.at[m][n + 1], q[m], k[2], k[3]);
    }
  };
  const auto load = [&](u32(&q)[kRowBlocks][4], int d) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) ldmatrix_x4(q[m], a + 2 * (16 * m * kQStride + d));
  };
  if constexpr (kGathers) {  // few queries, many addresses: the queries stay in registers
    u32 q[kDq / 16][kRowBlocks][4];
#pragma unroll
    for (int d = 0; d < kDq; d += 16) load(q[d / 16], d);
#pragma unroll
    for (int n = 0; n < kKeyBlocks; n += 2) {
      const u32 row = b + 2 * kQStride * rows.row(n / 2, of_lane);
#pragma unroll
      for (int d = 0; d < kDq; d += 16) visit(q[d / 16], row, n, d);
    }
  } else {
#pragma unroll
    for (int d = 0; d < kDq; d += 16) {
      u32 q[kRowBlocks][4];
      load(q, d);
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n += 2) visit(q, b + 2 * kQStride * rows.row(n / 2, of_lane), n, d);
    }
  }
}

// out[row][f] += weight[row][key] * value[key][f]
__device__ __forceinline__ void multiply_values(const u16* value, const MetRows& rows, const Sums<kKeyBlocks>& weights,
                                                Sums<kDv / 8>& out) {
  const int lane = threadIdx.x % 32;
  const u32 b = smem_address(value) + 2 * (lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < kKeyBlocks; n += 2) {
    const u32 of_row = b + 2 * kVStride * rows.row(n / 2, lane % 16);
    u32 p[kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      for (int half = 0; half < 2; ++half) {
        const float(&w)[4] = weights.at[m][n + half];
        p[m][2 * half] = Half::pack(w[0], w[1]);
        p[m][2 * half + 1] = Half::pack(w[2], w[3]);
      }
    }
#pragma unroll
    for (int f = 0; f < kDv / 8; f += 2) {
      u32 v[4];
      ldmatrix_x4_trans(v, of_row + 16 * f);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        Half::mma(out.at[m][f], p[m], v[0], v[1]);
        Half::mma(out.at[m][f + 1], p[m], v[2], v[3]);
      }
    }
  }
}

// Hides what the rows do not see. With kPreScale, scores become scores * scale + bias, in powers of two.
__device__ __forceinline__ void mask_scores(const ForwardArgs& args, const Cell& cell, const QueryTile& tile,
                                            const Meeting& meeting, Sums<kKeyBlocks>& scores) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * kWarpRows + 16 * m + 8 * half + lane / 4;
      const bool biased = kBiasKind != kBiasNone && !meeting.additional;
      long long bias = 0;
      if (kBiasKind != kBiasNone) bias = bias_row(args, cell, tile.head + row / kPositions, row_position(tile, row));
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores.at[m][n][2 * half + i];
          const bool seen = (meeting.seen.at[m][half] >> (2 * n + i) & 1) != 0;
          if constexpr (kPreScale) s *= args.scale_log2;
          if (biased && seen) s += bias_at(args, bias, met_position(meeting.origin, 8 * n + 2 * (lane % 4) + i));
          if (!seen) s = kNothing;
        }
      }
    }
  }
}

struct Softmax {
  float top[kRowBlocks][2], sum[kRowBlocks][2];
  __device__ __forceinline__ void begin() {
    for (int m = 0; m < kRowBlocks; ++m) {
      for (int half = 0; half < 2; ++half) {
        top[m][half] = kNothing;
        sum[m][half] = 0;
      }
    }
  }
  // Scores to weights; sums so far are scaled to the new maximum.
  __device__ __forceinline__ void step(Sums<kKeyBlocks>& scores, float scale, Sums<kDv / 8>& out) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[m][half];
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n) {
          most = fmaxf(most, fmaxf(scores.at[m][n][2 * half], scores.at[m][n][2 * half + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float base = most == kNothing ? 0.0f : most * scale;
        factor[half] = exp2_approx(top[m][half] * scale - base);
        if (top[m][half] == kNothing) factor[half] = 0;
        top[m][half] = most;
        float total = 0;
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& s = scores.at[m][n][2 * half + i];
            s = exp2_approx(s * scale - base);
            total += s;
          }
        }
        sum[m][half] = sum[m][half] * factor[half] + total;
      }
      if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int f = 0; f < kDv / 8; ++f) {
          out.at[m][f][0] *= factor[0];
          out.at[m][f][1] *= factor[0];
          out.at[m][f][2] *= factor[1];
          out.at[m][f][3] *= factor[1];
        }
      }
    }
  }
};

// Row `row` of a tile of the calling block; a call of its own, which keeps its registers out of the kernel's.
static __device__ __noinline__ void careful_row(const ForwardArgs& args, int turn, int row) {
  const BlockTiles all = tiles_of_block(args);
  QueryTile tile = all.tile;
  tile.place_heads(args, all.first_head_block + turn);
  const Position q = row_position(tile, row);
  if (row_exists(tile, row, q)) careful_query(args, all.cell, tile.head + row / kPositions, tile.kv_head, q);
}

// The rows of a tile of this warp: sums to the output.
__device__ __forceinline__ void finish(const ForwardArgs& args, const QueryTile& tile, int turn, const Softmax& softmax,
                                       const Sums<kDv / 8>& out, Smem& smem) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = kPreScale ? 1.0f : args.scale_log2;
  float finite = 0;  // NaN once a value is NaN or infinite: perhaps from a key that the row does not see
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[m][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float factor = sum == 0 ? 0.0f : reciprocal_approx(sum);
      const int row = warp * kWarpRows + 16 * m + 8 * half + lane / 4;
#pragma unroll
      for (int f = 0; f < kDv / 8; ++f) {
        const float x = out.at[m][f][2 * half] * factor, y = out.at[m][f][2 * half + 1] * factor;
        finite = fmaf(y, 0.0f, fmaf(x, 0.0f, finite));
        *reinterpret_cast<u32*>(&smem.out[row * kVStride + 8 * f + 2 * (lane % 4)]) = Half::pack(x, y);
      }
      if constexpr (kLogsumexp) {
        const Position p = row_position(tile, row);
        if (lane % 4 == 0 && row_exists(tile, row, p)) {
          const float lse =
              sum == 0 ? kNothing : (softmax.top[m][half] * scale + log2_approx(sum)) * 0.693147180559945f;
          const Placed& placed = smem.shared.logsumexp;
          static_cast<float*>(args.logsumexp.data)[placed.row(p, tile.head + row / kPositions)] = lse;
        }
      }
    }
  }
  __syncwarp();
  store_query_rows<kHeadDimV, kVStride, kWarpRows>(args.output, smem.shared.output, tile, smem.out, warp * kWarpRows);
  if (__any_sync(~0u, finite != 0.0f)) {
    __syncwarp();
    for (int r = 0; r < kWarpRows; ++r) careful_row(args, turn, warp * kWarpRows + r);
  }
}

__device__ __forceinline__ Shared prepare(const ForwardArgs& args) {
  Shared s;
  s.all = tiles_of_block(args);
  const Cell& cell = s.all.cell;
  s.tiles = 1;
  for (int a = 0; a < 3; ++a) {
    s.hull.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::hull(cell.grid.axis[a], s.all.tile.box.axis[a]);
    s.tiles *= a < kFirstAxis ? 1 : geometry::ceil_div(geometry::hi(s.hull.axis[a].size(), 0), kTileKv[a]);
    s.from.limit[a] = s.hull.axis[a].end;
  }
  if (kAdditional) s.tiles += geometry::ceil_div(args.additional, kKeys);
  s.from.key = place(args.key, cell, cell.first_key);
  s.from.value = place(args.value, cell, cell.first_key);
  if (kAdditional) {
    s.from.additional_key = place_additional(args.additional_keys, cell);
    s.from.additional_value = place_additional(args.additional_values, cell);
  }
  s.query = place(args.query, cell, cell.first_query);
  s.output = place(args.output, cell, cell.first_query);
  if (kLogsumexp) s.logsumexp = place(args.logsumexp, cell, cell.first_query);
  return s;
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) forward(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  if (threadIdx.x == 0) smem.shared = prepare(args);
  __syncthreads();
  if (smem.shared.all.tile.box.empty()) return;
  note_windows(smem.windows, smem.shared.all);
  const int turns = kTurns > 1 ? smem.shared.all.turns : 1;
  for (int turn = 0; turn < turns; ++turn) {
    if (turn > 0) __syncthreads();  // all is read and written
    const Sources from = smem.shared.from;
    const Box hull = smem.shared.hull;
    const int tiles = kStages == 1 ? 1 : smem.shared.tiles;
    QueryTile tile = smem.shared.all.tile;
    if constexpr (kTurns > 1) tile.place_heads(args, smem.shared.all.first_head_block + turn);
    KeyWalk ahead;
    const auto load_next = [&](int into) {
      if (threadIdx.x == 0) smem.walk[into] = ahead;
      load_keys(args, from, ahead, tile.kv_head, smem.key[into], smem.value[into]);
      ahead.next(hull);
    };
    load_query_rows<kRows, kHeadDim, kQStride, kThreads>(args.query, smem.shared.query, tile, smem.query);
    cp_async_commit();
    ahead.begin(hull);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s < tiles) load_next(s);
      cp_async_commit();
    }
    Softmax softmax;
    softmax.begin();
    Sums<kDv / 8> out = {};
    int stage = 0;
    for (int t = 0; t < tiles; ++t) {
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      if (kStages > 1 && t + kAhead < tiles) load_next(stage == 0 ? kStages - 1 : stage - 1);
      cp_async_commit();
      const Meeting meeting = meet(args, smem.windows, smem.walk[stage]);
      if (meeting.use != TileUse::skip) {
        Sums<kKeyBlocks> scores;
        multiply_keys(smem.query, smem.key[stage], meeting.rows, scores);
        if (kPreScale || meeting.use == TileUse::masked) mask_scores(args, smem.shared.all.cell, tile, meeting, scores);
        softmax.step(scores, kPreScale ? 1.0f : args.scale_log2, out);
        multiply_values(smem.value[stage], meeting.rows, scores, out);
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();  // of queries that saw no tile of keys
    __syncthreads();     // query rows are read by their own warp only, but out rows overlap those of others
    finish(args, tile, turn, softmax, out, smem);
  }
}

}  // namespace vicus::gpu
