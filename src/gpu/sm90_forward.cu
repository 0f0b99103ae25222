// Attention forward with the tensor cores of sm_90a, for 16-bit storage: a block stays on its multiprocessor and takes one
// tile of queries after the other (FlashAttention-3: Shah et al. 2024).
//
// One warp's lane loads boxes of tokens with the copy engine, straight from the caller's layout; kWarpgroups warpgroups own
// 64 queries each. A warpgroup starts the scores of a key tile and the sums of the one before together and makes weights
// of the new scores under the latter; a named barrier per warpgroup hands the tensor cores around, so that one's softmax
// runs under another's products. Key tiles that no query of a warpgroup sees are skipped by it, those that every query
// sees are not masked.
//
// Barriers: see Smem. Named barriers: kOrder + w, of warpgroup w and the one before it.
#include "careful.cuh"
#include "sm90_softmax.cuh"
#include "sm90_store.cuh"
#include "sm90_tiles.cuh"

namespace vicus::gpu {

constexpr int kOrder = 1;
constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : 24, kMathRegisters = kWarpgroups == 3 ? 160 : 240;

__device__ __forceinline__ void take_turn(int warpgroup) {
  if constexpr (kPingPong) barrier_sync(kOrder + warpgroup, 2 * kWarpgroupThreads);
}
__device__ __forceinline__ void give_turn(int warpgroup) {
  if constexpr (kPingPong) {
    barrier_arrive(kOrder + (warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), 2 * kWarpgroupThreads);
  }
}

// The products of one warpgroup.
struct Products {
  u64 query, keys, values;
  float scores[kKeys / 2], out[kHeadDimV / 2];
  u32 weights[kKeys / 4];  // of the key tile before, as the second product takes them

  __device__ __forceinline__ Products(const Smem& smem, int warpgroup)
      : query(operand(smem_address(smem.query[warpgroup][0]), 16)),
        keys(operand(smem_address(smem.key[0][0]), 16)),
        values(operand(smem_address(smem.value[0][0]), kKeys * kSlab * 2)) {}

  // scores = query . key, in flight
  __device__ __forceinline__ void start_scores(int stage) {
    const u64 key = keys + stage * (kSlabs * kKeys * kSlab * 2 / 16);
    hold(scores);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDq; d += 16) {
      const int at = d % kSlab * 2 / 16, slab = d / kSlab;
      wgmma_scores(scores, query + (slab * kRows * kSlab * 2 / 16 + at), key + (slab * kKeys * kSlab * 2 / 16 + at),
                   d > 0);
    }
    wgmma_commit();
  }
  // out += weights . value, in flight
  __device__ __forceinline__ void start_sums(int stage) {
    const u64 value = values + stage * (kValueSlabs * kKeys * kSlab * 2 / 16);
    hold(out);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) {
      wgmma_values(out, weights[k / 4], weights[k / 4 + 1], weights[k / 4 + 2], weights[k / 4 + 3],
                   value + k * kSlab * 2 / 16, 1);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void scale_sums(const float (&factor)[2]) {
#pragma unroll
    for (int f = 0; f < kHeadDimV / 2; f += 4) {
      out[f] *= factor[0];
      out[f + 1] *= factor[0];
      out[f + 2] *= factor[1];
      out[f + 3] *= factor[1];
    }
  }
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = Half::pack(scores[2 * i], scores[2 * i + 1]);
  }
};

// One warpgroup's rows of one tile of queries.
struct Attend {
  const ForwardArgs& args;
  Smem& smem;
  Products& p;
  const Job& job;
  const int warpgroup;
  Ring& ring;  // the stage of the next key tile
  Ring before;
  bool pending = false;  // weights of the tile at `before` wait for their product
  bool noted = false;    // what the rows see
  Softmax softmax;

  // Rows of this thread: this one and 8 more.
  __device__ __forceinline__ int first_row() const { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

  // Notes what the rows of this warp see.
  __device__ __forceinline__ void note_windows() {
    const TilePlace place = job.place;
    const Cell cell = make_cell(args, place.cell);
    const QueryTile tile = tile_of(place, cell);
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 16;
    const Position position = box_position(box_origin(tile, warpgroup), row);
    const bool exists = box_has(tile, row, position);
    __syncwarp();  // all lanes are done with the rows before
    for (int a = kFirstAxis; a < 3; ++a) {
      smem.seen[warpgroup][row][a - kFirstAxis] =
          exists ? geometry::window(cell.grid.axis[a], position.at[a]) : Span{0, 0};
    }
    __syncwarp();
    noted = true;
  }

  // Lets what the warp has read be overwritten.
  __device__ __forceinline__ void leave(u64& empty) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&empty));
  }

  __device__ __forceinline__ void start_sums() {
    mbarrier_wait(smem_address(&smem.value_full[before.stage]), before.phase);
    p.start_sums(before.stage);
  }

  __device__ __forceinline__ void finish_pending() {
    start_sums();
    wgmma_wait<0>();
    hold(p.out);
    leave(smem.value_empty[before.stage]);
    pending = false;
  }

  // Scores of the tile at `ring` to weights, under the sums of the tile before if those are pending.
  template <bool kPending, bool kMasked>
  __device__ __forceinline__ void step() {
    take_turn(warpgroup);
    p.start_scores(ring.stage);
    if constexpr (kPending) start_sums();
    give_turn(warpgroup);
    ThreadMask mask;
    if constexpr (kMasked) {
      if (!noted) note_windows();
      see_keys(&smem.seen[warpgroup][first_row()], smem.key_tile[ring.stage].walk, args.additional, mask);
    }
    wgmma_wait<kPending ? 1 : 0>();
    hold(p.scores);
    leave(smem.key_empty[ring.stage]);
    if constexpr (kMasked) hide_keys(mask, kNothing, p.scores);
    float factor[2];
    softmax.step(p.scores, args.scale_log2, factor);
    hold(p.scores);  // weights are made while the sums are in flight
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
      if constexpr (kPending) wgmma_wait<0>();
      hold(p.out);
      p.scale_sums(factor);
    } else if constexpr (kPending) {
      wgmma_wait_other();
      hold(p.out);
    }
    if constexpr (kPending) leave(smem.value_empty[before.stage]);
    p.pack_weights();
    pending = true;
    before = ring;
  }

  __device__ __forceinline__ void skip() {
    if (pending && before.stage == ring.stage) finish_pending();  // or the values to skip would never come
    take_turn(warpgroup);
    give_turn(warpgroup);
    leave(smem.key_empty[ring.stage]);
    mbarrier_wait(smem_address(&smem.value_full[ring.stage]), ring.phase);
    leave(smem.value_empty[ring.stage]);
  }

  __device__ __forceinline__ void run() {
    const int key_tiles = job.key_tiles;
#pragma unroll
    for (int i = 0; i < kHeadDimV / 2; ++i) p.out[i] = 0;
    for (int t = 0; t < key_tiles; ++t) {
      mbarrier_wait(smem_address(&smem.key_full[ring.stage]), ring.phase);
      const TileUse use = smem.key_tile[ring.stage].use[warpgroup];
      if (use == TileUse::skip) {
        skip();
      } else if (use == TileUse::masked) {
        if (pending) step<true, true>();
        else step<false, true>();
      } else {
        if (pending) step<true, false>();
        else step<false, false>();
      }
      ring.next();
    }
    leave(smem.query_empty[warpgroup]);
    if (pending) finish_pending();
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
      const Position position = box_position(origin, first_row() + 8 * half);
      const bool exists = box_has(tile, first_row() + 8 * half, position);
      u16* row = static_cast<u16*>(args.output.data) + out_rows.row(position, tile.head);
      wrong[half] = __ballot_sync(~0u, store_row<kHeadDimV>(p.out, half, sum == 0 ? 0.0f : 1.0f / sum, exists, row));
      if constexpr (kLogsumexp) {
        if (threadIdx.x % 4 == 0 && exists) {
          const Placed rows = gpu::place(args.logsumexp, cell, cell.first_query);
          static_cast<float*>(args.logsumexp.data)[rows.row(position, tile.head)] =
              sum == 0 ? kNothing : (softmax.top[half] * args.scale_log2 + log2_approx(sum)) * 0.693147180559945f;
        }
      }
    }
    if ((wrong[0] | wrong[1]) == 0) return;
    __syncwarp();
    for (int r = 0; r < 16; ++r) {
      if (((r < 8 ? wrong[0] : wrong[1]) >> (4 * (r % 8)) & 0xf) == 0) continue;
      careful_query(args, cell, tile.head, tile.kv_head, box_position(origin, threadIdx.x / 32 % 4 * 16 + r));
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) sm90_forward(const __grid_constant__ Sm90Args args) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  if (threadIdx.x == 0) init_barriers(smem);
  __syncthreads();
  const int role = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (role == 0) {
    registers_down<kLoadRegisters>();
    if (threadIdx.x == 0) load(args, smem);
  } else {
    if constexpr (kWarpgroups > 1) registers_up<kMathRegisters>();
    const int warpgroup = role - 1;
    if (warpgroup == kWarpgroups - 1) give_turn(warpgroup);
    Products products(smem, warpgroup);
    Ring ring;
    for (u32 phase = 0;; phase ^= 1) {
      mbarrier_wait(smem_address(&smem.query_full[warpgroup]), phase);
      const Job& job = smem.job[warpgroup][phase];
      if (job.key_tiles < 0) break;
      Attend attend{args.forward, smem, products, job, warpgroup, ring};
      attend.run();
      attend.store();
    }
  }
}

}  // namespace vicus::gpu
