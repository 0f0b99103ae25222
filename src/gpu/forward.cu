// Attention forward with tensor cores of sm_80 and later, for 16-bit storage: one block per tile of queries, over the key
// tiles of its hull (FlashAttention-2: Dao 2023; online softmax: Milakov and Gimelshein 2018).
//
// Warps own 16 * kRowBlocks rows each. Key tiles start where the hull starts and are boxes of kTileKv; a ring of kStages
// tiles is loaded with cp.async while the warps multiply. A tile that every query sees needs no mask; one that no query of
// a warp sees is skipped by that warp; the others are masked with the bits of their meeting.
//
// Small windows: a warp owns a box of queries (kWarpQ), which it keeps in registers, and meets only a part of each key
// tile, the box kWarpKv around what its queries see, gathered by the row addresses that ldmatrix takes from each lane. With
// one stage, the only tile covers the hull.
//
// Constants of the prologue, besides those of products.cuh: Half, kStages, kMinBlocks, kSharedBytes, kLogsumexp; kPreScale
// (logits are scaled one by one).
#include "careful.cuh"
#include "products.cuh"

namespace vicus::gpu {

constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;  // tiles that are loaded before the first is used
constexpr float kNothing = -kInfinite;
constexpr int kColumns = 16 * kColumnSteps;

static_assert(!kOwnsKeys && kColumns <= 128);

struct Shared : QueryBlock {
  Placed output, logsumexp;
};

struct Smem {
  u16 key[kStages][(kKeys + kSpareRows) * kQStride];
  u16 value[kStages][(kKeys + kSpareRows) * kVStride];
  u16 query[kGathers ? 8 : kRows * kQStride];
  Windows windows;
  KeyWalk walk[kStages];  // where the key tile of a stage is
  Shared shared;
};
static_assert(sizeof(Smem) <= kSharedBytes);

// Hides what the rows do not see. With kPreScale, scores become scores * scale + bias, in powers of two.
__device__ __forceinline__ void mask_scores(const ForwardArgs& args, const Cell& cell, const QueryTile& tile,
                                            const Meeting& meeting, const SeenBits& bits, Scores<kColumns>& scores) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row() + 16 * m + 8 * half + lane / 4;
      const bool biased = kBiasKind != kBiasNone && !meeting.additional;
      long long bias = 0;
      if (kBiasKind != kBiasNone) bias = bias_row(args, cell, tile.head + row / kPositions, row_position(tile, row));
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores.at[m][n][2 * half + i];
          const bool seen = (bits.at[m][half] >> (2 * n + i) & 1) != 0;
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
  __device__ __forceinline__ void step(Scores<kColumns>& scores, float scale, Sums<kDv>& out) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[m][half];
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
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
        for (int n = 0; n < kColumns / 8; ++n) {
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
                                       const Sums<kDv>& out, const Smem& smem) {
  const int lane = threadIdx.x % 32;
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
#pragma unroll
      for (int f = 0; f < kDv / 8; ++f) {
        const float x = out.at[m][f][2 * half] * factor, y = out.at[m][f][2 * half + 1] * factor;
        finite = fmaf(y, 0.0f, fmaf(x, 0.0f, finite));
      }
      u32 two[kDv / 8];
      pack_row(out, m, half, factor, two);
      const int row = anew(first_row() + 16 * m + 8 * half + lane / 4), head = tile.head + row / kPositions;
      const Position p = row_position(tile, row);
      const bool exists = row_exists(tile, row, p);
      store_row<kHeadDimV>(static_cast<u16*>(args.output.data) + smem.shared.output.row(p, head), exists, 0, two);
      if constexpr (kLogsumexp) {
        if (lane % 4 == 0 && exists) {
          const float lse =
              sum == 0 ? kNothing : (softmax.top[m][half] * scale + log2_approx(sum)) * 0.693147180559945f;
          static_cast<float*>(args.logsumexp.data)[smem.shared.logsumexp.row(p, head)] = lse;
        }
      }
    }
  }
  if (__any_sync(~0u, finite != 0.0f)) {
    __syncwarp();
    for (int r = 0; r < kWarpRows; ++r) careful_row(args, turn, first_row() + r);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) forward(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  if (threadIdx.x == 0) {
    Shared& shared = smem.shared;
    shared.prepare(args);
    shared.output = place(args.output, shared.all.cell, shared.all.cell.first_query);
    if (kLogsumexp) shared.logsumexp = place(args.logsumexp, shared.all.cell, shared.all.cell.first_query);
  }
  __syncthreads();
  if (smem.shared.all.tile.box.empty()) return;
  const auto sees = [&](int a, int p) { return geometry::window(axis_of(smem.shared.all.cell, a), p); };
  if (!kGathers) note_windows(smem.windows, smem.shared.all.tile.box, sees);
  const int turns = kTurns > 1 ? smem.shared.all.turns : 1;
  for (int turn = 0; turn < turns; ++turn) {
    if (turn > 0) __syncthreads();  // all is read
    const Sources& from = smem.shared.from;
    const Box& hull = smem.shared.hull;
    const auto tiles = [&] { return kStages == 1 ? 1 : smem.shared.tiles; };
    QueryTile turned;
    if constexpr (kTurns > 1) {
      turned = smem.shared.all.tile;
      turned.place_heads(args, smem.shared.all.first_head_block + turn);
    }
    const QueryTile& tile = kTurns > 1 ? turned : smem.shared.all.tile;
    KeyWalk ahead;
    const auto load_next = [&](int into) {
      if (threadIdx.x == 0) smem.walk[into] = ahead;
      load_keys(args, from, ahead, tile.kv_head, smem.key[into], smem.value[into]);
    };
    if constexpr (!kGathers) {
      load_query_rows<kRows, kHeadDim, kThreads>(args.query, smem.shared.query, tile, smem.query);
      cp_async_commit();
    }
    ahead.begin(hull);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s > 0) ahead.next(hull);
      if (s < tiles()) load_next(s);
      cp_async_commit();
    }
    Resident<kHeadDim, kGathers> queries;
    if constexpr (kGathers) {
      queries.load([&](int r) { return query_row(args.query, smem.shared.query, tile, first_row() + r); });
    } else {
      queries.begin(smem.query);
    }
    if (kGathers && turn == 0) {
      note_windows(smem.windows, tile.box, sees);
      clear_spare_rows<kHeadDim>(smem.key);
      clear_spare_rows<kHeadDimV>(smem.value);
    }
    Softmax softmax;
    softmax.begin();
    Sums<kDv> out = {};
    int stage = 0;
    for (int t = 0; t < tiles(); ++t) {
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      if (kStages > 1 && t + kAhead < tiles()) {
        const int free = stage == 0 ? kStages - 1 : stage - 1;
        ahead = smem.walk[free == 0 ? kStages - 1 : free - 1];  // the last one that was loaded
        ahead.next(hull);
        load_next(free);
      }
      cp_async_commit();
      const Meeting meeting = meet(smem.windows, met_tile(args, smem.walk[stage]));
      if (meeting.use != TileUse::skip) {
        Scores<kColumns> scores = {};
        queries.dot(smem.key[stage], 0, meeting.rows, 0, scores);
        if (kPreScale || meeting.use == TileUse::masked) {
          // Not before the products, whose operands need the registers.
          const SeenBits bits = seen_bits(smem.windows, met_tile(args, smem.walk[stage]), meeting.origin);
          mask_scores(args, smem.shared.all.cell, tile, meeting, bits, scores);
        }
        softmax.step(scores, kPreScale ? 1.0f : args.scale_log2, out);
        Weights<kColumns> weights;
        pack(scores, weights);
        add<kHeadDimV>(weights, smem.value[stage], 0, meeting.rows, 0, 0, out);
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();  // of queries that saw no tile of keys
    finish(args, tile, turn, softmax, out, smem);
  }
}

}  // namespace vicus::gpu
