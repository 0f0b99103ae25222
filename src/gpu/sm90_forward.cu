// Attention forward with the tensor cores of sm_90a, for 16-bit storage: a block stays on its multiprocessor and takes one
// tile of queries after the other (FlashAttention-3: Shah et al. 2024).
//
// One warp's lane loads boxes of tokens with the copy engine, straight from the caller's layout; kWarpgroups warpgroups own
// 64 queries each. A warpgroup starts the scores of a key tile and the sums of the one before together and makes weights
// of the new scores under the latter; a named barrier per warpgroup hands the tensor cores around, so that one's softmax
// runs under another's products. A turn is passed on once more after a tile's rows are stored, so that the others need not
// wait for them. Key tiles that no query of a warpgroup sees are skipped by it, those that every query sees are not masked,
// and of those that rows see by whole lines, what is subtracted from scores hides the others (kWholeLines).
//
// Of small windows, most of that time is waiting. There several blocks share a multiprocessor, each with one warpgroup and one
// tile of queries, and products and softmax of a block simply follow each other (kCrowd, sm90_feed.cuh).
//
// Barriers: see Smem. Named barriers: kOrder + w, of warpgroup w and the one before it; kCleared + w, of warpgroup w.
#include "careful.cuh"
#include "sm90_feed.cuh"
#include "sm90_products.cuh"
#include "sm90_softmax.cuh"
#include "sm90_store.cuh"
#include "sm90_tiles.cuh"

namespace vicus::gpu {

constexpr int kOrder = 1, kCleared = 4;
constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : 24, kMathRegisters = kWarpgroups == 3 ? 160 : 240;

__device__ __forceinline__ void take_turn(int warpgroup) {
  if constexpr (kPingPong) barrier_sync(kOrder + warpgroup, 2 * kWarpgroupThreads);
}
__device__ __forceinline__ void give_turn(int warpgroup) {
  if constexpr (kPingPong) {
    barrier_arrive(kOrder + (warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), 2 * kWarpgroupThreads);
  }
}
__device__ __forceinline__ void pass_turn(int warpgroup) {
  take_turn(warpgroup);
  give_turn(warpgroup);
}

// Notes what the rows of this warp see.
__device__ __forceinline__ void note_rows(Smem& smem, const Cell& cell, const QueryTile& tile, int warpgroup) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 16;
  const Position position = box_position(box_origin(tile, warpgroup), row);
  const bool exists = box_has(tile, row, position);
  __syncwarp();  // all lanes are done with the rows before
  for (int a = kFirstAxis; a < 3; ++a) {
    smem.seen[warpgroup][row][a - kFirstAxis] =
        exists ? geometry::window(cell.grid.axis[a], position.at[a]) : Span{0, 0};
  }
  __syncwarp();
}

// One warpgroup's rows of one tile of queries.
struct Attend {
  const Sm90Args& all;
  const ForwardArgs& args;
  Smem& smem;
  Products& p;
  const Job& job;
  const int warpgroup;
  Ring& ring;  // the stage of the next key tile
  Ring before;
  int present = 0;  // of the tile at `before`, where kRagged
  int tiles_left = job.key_tiles;
  TileUse use = TileUse::skip;  // of the tile at `ring`
  bool pending = false;         // weights of the tile at `before` wait for their product
  bool noted = false;           // what the rows see
  bool whole_lines = false;     // kWholeLines: the layout has whole ones
  Softmax softmax;

  // Rows of this thread: this one and 8 more.
  __device__ __forceinline__ int first_row() const { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

  __device__ __forceinline__ void note_windows() {
    const TilePlace place = job.place;
    const Cell cell = make_cell(args, place.cell);
    note_rows(smem, cell, tile_of(place, cell), warpgroup);
    noted = true;
    whole_lines = kWholeLines && cell.grid.axis[2].keys >= kWindow[2];
  }

  // Lets what the warp has read be overwritten. The last lane says so: to racecheck, it is the one that has read.
  __device__ __forceinline__ void leave(u64& empty) const {
    __syncwarp();
    if (threadIdx.x % 32 == 31) mbarrier_arrive(smem_address(&empty));
  }

  // Steps over key tiles that no query of the warpgroup sees, to one that some do: false where there is none, or where
  // weights that wait for their product hold the stage that the copy engine needs next.
  __device__ __forceinline__ bool find_tile() {
    for (; tiles_left > 0; --tiles_left, ring.next()) {
      mbarrier_wait(smem_address(&smem.key_full[ring.stage]), ring.phase);
      use = smem.key_tile[ring.stage].use[warpgroup];
      if (use != TileUse::skip) return true;
      if (pending && before.stage == ring.stage) return false;
      pass_turn(warpgroup);
      leave(smem.key_empty[ring.stage]);
      mbarrier_wait(smem_address(&smem.value_full[ring.stage]), ring.phase);
      leave(smem.value_empty[ring.stage]);
    }
    return false;
  }

  __device__ __forceinline__ void start_sums() {
    mbarrier_wait(smem_address(&smem.value_full[before.stage]), before.phase);
    if (kRagged && present < kKeys) {
      clear_rows(smem.value[before.stage], present);
      show_products(kCleared + warpgroup);
    }
    p.start_sums(before.stage);
  }

  // What the rows of this thread see of the tile at `ring`.
  __device__ __forceinline__ void see_tile(ThreadMask& mask) {
    if constexpr (kAllSeen) return see_present(smem.key_tile[ring.stage].present, mask);
    if (!noted) note_windows();
    see_keys(smem.seen[warpgroup][first_row()], smem.seen[warpgroup][first_row() + 8], smem.key_tile[ring.stage].walk,
             args.additional, mask);
  }

  // Scores of the tile at `ring`, in flight, to weights; with `pending`, sums of the tile before are in flight, too.
  template <bool kMasked>
  __device__ __forceinline__ void weigh() {
    ThreadMask mask;
    Sight sight;
    if constexpr (kMasked && kWholeLines) {
      if (!noted) note_windows();
      for (int half = 0; half < 2; ++half) {
        sight.lines[half] =
            lines_of(smem.seen[warpgroup][first_row() + 8 * half], smem.key_tile[ring.stage].walk.origin);
        sight.some[half] = sight.lines[half] != 0;
      }
      if (!whole_lines) see_tile(mask);
    } else if constexpr (kMasked) {
      see_tile(mask);
    }
    const int now_present = kRagged ? smem.key_tile[ring.stage].present : kKeys;
    wgmma_wait<1>();
    hold(p.scores);
    if (kCopies == Copies::asked && use == TileUse::masked) {
      see_tile(mask);
      hide_keys(mask, kNothing, p.scores);
      for (int half = 0; half < 2; ++half) sight.some[half] = sees(mask, half);
    }
    leave(smem.key_empty[ring.stage]);
    if constexpr (kMasked) {
      if (!whole_lines) {
        hide_keys(mask, kNothing, p.scores);
        for (int half = 0; half < 2; ++half) sight.some[half] = sees(mask, half);
      }
    }
    float factor[2];
    softmax.step(p.scores, args.scale_log2, sight, factor);
    hold(p.scores);  // weights are made while the sums are in flight
    // ptxas would wait before the exponentials, but for a branch, which all warps must take alike.
    if (anew(args.additional) < 0) wgmma_wait<0>();
    else wgmma_wait_other();
    hold(p.out);
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) p.scale_sums(factor);
    if (pending) leave(smem.value_empty[before.stage]);
    p.pack_weights();
    pending = true;
    before = ring;
    present = now_present;
    ring.next();
    --tiles_left;
  }

  // Once the queries are there.
  __device__ __forceinline__ void begin_queries() const {
    if constexpr (kNextHeadFollows<kHeadDim>) {
      clear_next_head<kHeadDim>(smem.query[warpgroup][0]);
      show_products(kCleared + warpgroup);
    }
  }

  // One product after the other: in a crowd, those of other blocks run meanwhile.
  __device__ __forceinline__ void run_in_crowd() {
#pragma unroll
    for (int i = 0; i < kHeadDimV / 2; ++i) p.out[i] = 0;
    const Span(&first)[kRank] = smem.seen[warpgroup][first_row()],
          (&other)[kRank] = smem.seen[warpgroup][first_row() + 8];
    Position origin;  // of the first tile
    for (int a = 0; a < 3; ++a) origin.at[a] = smem.hull[0].axis[a].begin;
    ThreadMask columns;
    if constexpr (kSameColumns) see_columns(first, other, origin, columns);
    constexpr int kLines = kRank == 3 ? 1 : 0;  // their axis
    ThreadLines lines(first[kLines], other[kLines], origin.at[1]);
    mbarrier_wait(smem_address(&smem.query_full[warpgroup]), 0);
    begin_queries();
#pragma unroll 1
    for (; tiles_left > 0; --tiles_left, ring.next()) {
      mbarrier_wait(smem_address(&smem.key_full[ring.stage]), ring.phase);
      p.start_scores(ring.stage);
      wgmma_commit();
      if (threadIdx.x == 0 && tiles_left > 1) feed_next(all, smem, ring);
      ThreadMask mask;
      if constexpr (kSameColumns) mask = columns;
      const KeyWalk& walk = smem.key_tile[ring.stage].walk;
      const bool same = kSameColumns && !(kAdditional && walk.additional);
      if (same && kRank == 2) lines.see(mask);
      else if (same) see_lines(first, other, walk.origin, mask);
      else see_keys(first, other, walk, args.additional, mask);
      wgmma_wait<0>();
      hold(p.scores);
      leave(smem.key_empty[ring.stage]);
      if (sees_any(mask)) {
        hide_keys(mask, kNothing, p.scores);
        float factor[2];
        softmax.step(p.scores, args.scale_log2, {}, factor);
        if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) p.scale_sums(factor);
        p.pack_weights();
      } else {
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) p.weights[i] = 0;
      }
      before = ring;
      start_sums();
      wgmma_commit();
      wgmma_wait<0>();
      hold(p.out);
      leave(smem.value_empty[ring.stage]);
      lines.next();
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kHeadDimV / 2; ++i) p.out[i] = 0;
    bool reading = true;  // the queries
    while (find_tile()) {
      take_turn(warpgroup);
      p.start_scores(ring.stage);
      wgmma_commit();
      wgmma_commit();  // in the place of sums
      for (;;) {
        give_turn(warpgroup);
        if constexpr (kCopies != Copies::both) weigh<kCopies == Copies::masked>();
        else if (use == TileUse::masked) weigh<true>();
        else weigh<false>();
        if (!find_tile()) break;
        take_turn(warpgroup);
        p.start_scores(ring.stage);
        wgmma_commit();
        start_sums();
        wgmma_commit();
      }
      const bool last = tiles_left == 0;
      if (last) {
        leave(smem.query_empty[warpgroup]);
        reading = false;
        take_turn(warpgroup);
      }
      start_sums();
      wgmma_commit();
      if (last) give_turn(warpgroup);
      wgmma_wait<0>();
      hold(p.out);
      leave(smem.value_empty[before.stage]);
      pending = false;
    }
    if (reading) {
      leave(smem.query_empty[warpgroup]);
      pass_turn(warpgroup);
    }
  }

  // A row of what this part of the keys gives.
  __device__ __forceinline__ long long part_row(const Rows& t, const Cell& cell, const Position& q, int row,
                                                int width) const {
    return job.part * all.part_rows * width +
           gpu::place(t, cell, cell.first_query).row(q, job.place.head + row % kTileHeads);
  }

  // As store_row, and the logsumexp.
  __device__ __forceinline__ bool store_part(const Cell& cell, const Position& q, int half, int row, bool exists,
                                             float factor, float lse) const {
    float* to = static_cast<float*>(all.part_output.data);
    if (exists) to += part_row(all.part_output, cell, q, row, kHeadDimV) + threadIdx.x % 4 * 2;
    float finite = 0;  // NaN once a value is NaN or infinite
#pragma unroll
    for (int n = 0; n < kHeadDimV / 8; ++n) {
      const float a = p.out[4 * n + 2 * half] * factor, b = p.out[4 * n + 2 * half + 1] * factor;
      finite = fmaf(b, 0.0f, fmaf(a, 0.0f, finite));
      if (exists) *reinterpret_cast<float2*>(to + 8 * n) = float2{a, b};
    }
    if (exists && threadIdx.x % 4 == 0) {
      static_cast<float*>(all.part_logsumexp.data)[part_row(all.part_logsumexp, cell, q, row, 1)] = lse;
    }
    return finite != 0.0f && exists;
  }

  // The row again, key by key.
  __device__ __forceinline__ void store_carefully(const Cell& cell, const QueryTile& tile, const Position& q, int row) {
    const int head = box_head(tile, row);
    if constexpr (!kKeyParts) {
      careful_query(args, cell, head, tile.kv_head, q);
    } else {
      CarefulRow again{args, cell, head, tile.kv_head, q};
      const Box hull = hull_of(cell, tile), seen = seen_by(cell, q);
      KeyWalk walk;
      walk.begin(hull, job.first_key_tile);
      for (int t = 0; t < job.key_tiles; ++t, walk.next(hull)) {
        if (kAdditional && walk.additional) {
          again.add_additional({walk.origin.at[2], geometry::lo(walk.origin.at[2] + kKeys, args.additional)});
        } else {
          again.add(keys_in_tile(seen, walk));
        }
      }
      float* to = static_cast<float*>(all.part_output.data) + part_row(all.part_output, cell, q, row, kHeadDimV);
      const float lse = again.finish([&](int f, float x) { to[f] = x; });
      static_cast<float*>(all.part_logsumexp.data)[part_row(all.part_logsumexp, cell, q, row, 1)] = lse;
    }
  }

  __device__ __forceinline__ void store() {
    const TilePlace place = job.place;
    const Cell cell = make_cell(args, place.cell);
    const QueryTile tile = tile_of(place, cell);
    const Position origin = box_origin(tile, warpgroup);
    const Placed out_rows = gpu::place(args.output, cell, cell.first_query);
    u32 wrong[2];  // four bits of each row: something is not finite, perhaps from a key that the row does not see
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int row = first_row() + 8 * half;
      const Position position = box_position(origin, row);
      const bool exists = box_has(tile, row, position);
      const float factor = sum == 0 ? 0.0f : reciprocal_approx(sum);
      const float lse = sum == 0 ? kNothing : (softmax.base[half] + log2_approx(sum)) * 0.693147180559945f;
      bool here;
      if constexpr (kKeyParts) {
        here = store_part(cell, position, half, row, exists, factor, lse);
      } else {
        u16* to = static_cast<u16*>(args.output.data) + out_rows.row(position, box_head(tile, row));
        here = store_row<kHeadDimV>(p.out, half, factor, exists, to);
        if constexpr (kLogsumexp) {
          const Placed rows = gpu::place(args.logsumexp, cell, cell.first_query);
          float* const one = static_cast<float*>(args.logsumexp.data) + rows.row(position, box_head(tile, row));
          store_one(one, lse, threadIdx.x % 4 == 0 && exists);
        }
      }
      wrong[half] = __ballot_sync(~0u, here);
    }
    if ((wrong[0] | wrong[1]) == 0) return;
    __syncwarp();
    for (int r = 0; r < 16; ++r) {
      if (((r < 8 ? wrong[0] : wrong[1]) >> (4 * (r % 8)) & 0xf) == 0) continue;
      const int row = threadIdx.x / 32 % 4 * 16 + r;
      store_carefully(cell, tile, box_position(origin, row), row);
    }
  }
};

// One tile of queries, in a crowd. All threads work out which, for to hear of it takes longer.
__device__ __forceinline__ void attend_once(const Sm90Args& args, Smem& smem) {
  Job job;
  job.place = place_of(args, static_cast<int>(blockIdx.x));
  const Cell cell = make_cell(args.forward, job.place.cell);
  const QueryTile tile = tile_of(job.place, cell);
  if (tile.box.empty()) return;
  if (threadIdx.x == 0) {
    init_barriers(smem);
    load_query(args, smem, cell, tile, 0);
  }
  const Box hull = hull_of(cell, tile);
  job.key_tiles = key_tiles_of(hull) + additional_tiles(args.forward);
  if (threadIdx.x == 0) begin_feed(args, smem, job, cell, tile.kv_head, hull);
  note_rows(smem, cell, tile, 0);
  __syncthreads();
  Products products(smem, 0);
  Ring ring;
  Attend attend{args, args.forward, smem, products, smem.job[0][0], 0, ring};
  attend.run_in_crowd();
  attend.store();
}

// One after the other, of those that are the block's.
__device__ __forceinline__ void attend_all(const Sm90Args& args, Smem& smem) {
  if (threadIdx.x == 0) init_barriers(smem);
  __syncthreads();
  const int role = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (role == 0) {
    registers_down<kLoadRegisters>();
    if (threadIdx.x == 0) load(args, smem);
  } else {
    registers_up<kMathRegisters>();
    const int warpgroup = role - 1;
    if (warpgroup == kWarpgroups - 1) give_turn(warpgroup);
    Products products(smem, warpgroup);
    Ring ring;
    for (u32 phase = 0;; phase ^= 1) {
      mbarrier_wait(smem_address(&smem.query_full[warpgroup]), phase);
      const Job& job = smem.job[warpgroup][phase];
      if (job.key_tiles < 0) break;
      Attend attend{args, args.forward, smem, products, job, warpgroup, ring};
      attend.begin_queries();
      attend.run();
      attend.store();
      pass_turn(warpgroup);
    }
  }
}

// Blocks of one warpgroup start with as many registers as those of two: more cannot be taken when all may have 255.
constexpr int kMostThreads = kWarpgroups == 1 && !kCrowd ? 3 * kWarpgroupThreads : kThreads;

extern "C" __global__ void __launch_bounds__(kMostThreads, kMinBlocks)
    sm90_forward(const __grid_constant__ Sm90Args args) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  if constexpr (kKeyParts) let_next_begin(true);  // the merge
  if constexpr (kCrowd) attend_once(args, smem);
  else attend_all(args, smem);
}

}  // namespace vicus::gpu
