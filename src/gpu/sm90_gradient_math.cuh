// The math of the backward kernels of sm90: what a warpgroup does with the tiles of columns that its rows see.
// sm90_backward.cu has the order of the products.
#pragma once

#include "careful_gradients.cuh"
#include "sm90_gradient_load.cuh"
#include "sm90_gradient_products.cuh"
#include "sm90_gradient_store.cuh"
#include "sm90_mask.cuh"
#include "sm90_query_sums.cuh"
#include "sm90_store.cuh"

namespace vicus::gpu {

constexpr int kShown = 1;  // named barriers of the math
// S and dP are multiplied one after the other: there are registers for dP beside S.
constexpr bool kAtOnce = kCrowd || (kSumsFirst && !kSumsSecond);

// One warpgroup's rows.
struct Attend {
  const BackwardArgs& args;
  Smem& smem;
  Products& p;
  Loader loader;  // kCrowd
  const int warpgroup;
  float lse[2] = {}, delta[2] = {};  // of the rows, where those are queries
  Ring ring, before;
  SecondRing second, second_before;  // kApart
  int met = 0;                       // tiles before the one at `ring`
  int buffer = 0;                    // that the next dS goes to, where there are two
  bool pending = false;  // dS (or P) of the tile at `before` waits for its product; kAdds: always, zeros at first

  // Rows of this thread: this one and 8 more. Where columns are cleared, registers are too few to keep it.
  __device__ __forceinline__ int first_row() const {
    const u32 thread = kOthers ? anew(threadIdx.x) : threadIdx.x;
    return thread / 32 % 4 * 16 + thread % 32 / 4;
  }
  __device__ __forceinline__ Position position_of(int row) const {
    return box_position(box_origin(smem.rows.tile, warpgroup), row);
  }

  __device__ __forceinline__ void note_statistics() {
    row_statistics(args, smem, first_row(), [&](int row) { return position_of(row); }, lse, delta);
  }

  __device__ __forceinline__ void arrive(const u64& barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&barrier));
  }
  // By all lanes: that those who only wait at a barrier come after each other is not known to tools that look for races. Where
  // else all arrive, registers decide.
  __device__ __forceinline__ void arrive_all(const u64& barrier) const { mbarrier_arrive(smem_address(&barrier)); }
  __device__ __forceinline__ void leave(const Ring& ring) const { arrive_all(smem.empty[ring.stage]); }
  // Columns of the second product, where they come apart.
  __device__ __forceinline__ int second_stage() const { return kApart ? second.stage : ring.stage; }
  __device__ __forceinline__ void await_second(const SecondRing& ring) const {
    if constexpr (kApart) mbarrier_wait(smem_address(&smem.second_full[ring.stage]), ring.phase);
  }
  __device__ __forceinline__ void leave_second(const SecondRing& ring) const { arrive(smem.second_empty[ring.stage]); }

  // Of a column pair and a row half.
  __device__ __forceinline__ float2 of_pair(const float (&row)[2], const float* columns, int n, int half) const {
    if constexpr (kOfQueries) return {row[half], row[half]};
    return *reinterpret_cast<const float2*>(columns + 8 * n + threadIdx.x % 4 * 2);
  }

  // S to P.
  __device__ __forceinline__ void weigh(int stage) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 of = of_pair(lse, smem.lse[stage], n, half);
        float(&s)[kColumns / 2] = p.scores;
        const int i = 4 * n + 2 * half;
        s[i] = exp2_approx(s[i] * args.scale_log2 - of.x);
        s[i + 1] = exp2_approx(s[i + 1] * args.scale_log2 - of.y);
      }
    }
  }
  // dP to dS.
  __device__ __forceinline__ void differentiate(int stage) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 of = of_pair(delta, smem.delta[stage], n, half);
        const int i = 4 * n + 2 * half;
        if constexpr (kPacksLate) p.weights[i / 2] = Half::pack(p.scores[i], p.scores[i + 1]);
        p.grads[i] = p.scores[i] * (p.grads[i] - of.x);
        p.grads[i + 1] = p.scores[i + 1] * (p.grads[i + 1] - of.y);
      }
    }
  }

  // kAdds: of the barriers of the dS of this tile; of that before it, the other one.
  __device__ __forceinline__ u32 grads_phase() const { return ~met & 1; }

  // dS to shared memory, as operand of its product.
  __device__ __forceinline__ void put_grads() {
    if constexpr (kAdds) mbarrier_wait(smem_address(&smem.grads_empty), grads_phase() ^ 1);
    const u32 thread = anew(threadIdx.x);  // registers are few: places are worked out again for every tile
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      u32 four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = Half::pack(p.grads[4 * n + 2 * i], p.grads[4 * n + 2 * i + 1]);
      if constexpr (kKeepsGrads) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p.packed_grads[2 * n + i] = four[i];
      }
      put_sixteen(thread, smem.grad_scores[buffer][warpgroup][n * 8 / kSlab], n, four);
    }
    if constexpr (kAdds) {
      fence_proxy_async();
      arrive_all(smem.grads_full);
    } else {
      show_products(kShown + warpgroup);
      buffer ^= 1;
    }
  }
  static __device__ __forceinline__ void clear(float (&values)[kColumns / 2]) {
#pragma unroll
    for (float& x : values) x = 0;
  }
  __device__ __forceinline__ void put_no_grads() {
    clear(p.grads);
    put_grads();
  }

  // The sums of the tile before, in flight; of several blocks on a multiprocessor, those of this tile.
  __device__ __forceinline__ void start_pending() {
    if constexpr (kAdds) {
      mbarrier_wait(smem_address(&smem.grads_full), grads_phase() ^ 1);
      p.start_query_sums();
    }
    if constexpr (kCrowd && kSumsBoth) p.start_second_sums(before.stage);
    if constexpr (kSumsFirst) {
      p.start_first_sums(before.stage, kAdds ? 0 : buffer ^ 1);
    } else {
      await_second(second_before);
      p.start_second_sums(second_before.stage);
    }
  }
  // dQ of the tile before: all that were started before its dK are done.
  __device__ __forceinline__ void put_queries() {
    hold(p.queries);
    arrive(smem.grads_empty);
    mbarrier_wait(smem_address(&smem.sums_empty), grads_phase());
    put_query_sums(smem, p.queries, warpgroup);
    arrive(smem.sums_full);
  }
  __device__ __forceinline__ void finish_pending() {
    start_pending();
    if constexpr (kCrowd) load_ahead();
    wgmma_wait<0>();
    leave_pending();
    if constexpr (kAdds) put_queries();
    pending = false;
  }
  // Once the sums of the tile before are done.
  __device__ __forceinline__ void leave_pending() {
    if constexpr (kSumsFirst) hold(p.first_out);
    if constexpr (kSumsSecond && (kCrowd || !kSumsFirst)) hold(p.second_out);
    if constexpr (!kSumsFirst) leave_second(second_before);
    else if (!kAdds || met > 0) leave(before);
  }

  // What the rows of this thread see of the columns.
  __device__ __forceinline__ void see_columns(ThreadMask& mask) const {
    Span seen[2][kRank];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Position line = box_position({}, first_row() + 8 * half);
#pragma unroll
      for (int a = kFirstAxis; a < 3; ++a) {
        seen[half][a - kFirstAxis] = smem.seen[warpgroup][seen_before(a) + line.at[a]];
      }
    }
    see_keys(seen[0], seen[1], smem.tile[ring.stage].walk, args.additional, mask);
  }
  template <bool kMasked>
  __device__ __forceinline__ void hide_columns(ThreadMask& mask, float (&x)[kColumns / 2]) const {
    if (!kMasked && (kCopies == Copies::both || use() != TileUse::masked)) return;
    if constexpr (kCopies == Copies::asked) see_columns(mask);
    hide_keys(mask, 0.0f, x);
  }
  // Of the tile at `ring`: read where it is needed, registers are few.
  __device__ __forceinline__ TileUse use() const { return smem.tile[ring.stage].use[warpgroup]; }

  // Once the rows are there.
  __device__ __forceinline__ void begin_rows() const {
    if constexpr (kNextHeadFollows<kHeadDim> || (kSumsFirst && kNextHeadFollows<kHeadDimV>)) {
      clear_next_head<kHeadDim>(smem.row_first(warpgroup));
      if constexpr (kSumsFirst) clear_next_head<kHeadDimV>(smem.row_second(warpgroup));
      show_products(kShown + warpgroup);
    }
  }

  // kCrowd: loads all that there is a stage for, now that the tile before this one has left its own.
  __device__ __forceinline__ void load_ahead() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp != 0 && (kOfQueries || warp < kFirstCopyWarp)) return;
    while (loader.left > 0 && smem.tiles - loader.left < met + kStages) loader.next();
  }

  // kCrowd: the first loads.
  __device__ __forceinline__ void begin_loads() {
    loader.begin();
    load_ahead();
  }

  // One tile. Its dS waits for its products with the next one.
  template <bool kPending, bool kMasked>
  __device__ __forceinline__ void step() {
    p.start_first(ring.stage);
    if constexpr (kAtOnce) {
      await_second(second);
      p.start_second(second_stage());
    }
    if constexpr (kPending) start_pending();
    constexpr int kBefore = kPending ? 1 : 0;
    ThreadMask mask;
    if constexpr (kMasked) see_columns(mask);
    bool sees = true;  // any of the warp's rows
    if constexpr (kCrowd && kMasked) sees = sees_any(mask);
    wgmma_wait<kBefore + (kAdds ? 1 : 0) + (kAtOnce ? 1 : 0)>();
    hold(p.scores);
    if (sees) {
      weigh(ring.stage);
      if constexpr (kSumsSecond) hide_columns<kMasked>(mask, p.scores);  // otherwise P is only a factor of dS
    } else {
      clear(p.scores);
    }
    hold(p.scores);
    if constexpr (kAdds) {
      wgmma_wait<kKeepsGrads ? 0 : 1>();  // packed P takes the registers of packed dS
      put_queries();
    }
    if constexpr (!kSumsFirst) {
      leave(ring);
      if constexpr (kPending) {
        wgmma_wait<0>();
        leave_pending();
      }
      p.pack(p.scores);
      note_pending();
      return;
    }
    if constexpr (kPacksLate) {
      p.start_second(ring.stage);
      wgmma_wait<0>();
      hold(p.scores);
    } else if constexpr (!kAtOnce) {
      p.pack(p.scores);
      p.start_second(ring.stage);
      p.start_second_sums(ring.stage);
      wgmma_wait<1>();
    } else {
      wgmma_wait<kBefore>();
      if constexpr (kApart) leave_second(second);
    }
    if constexpr (kPending && !kAtOnce) leave_pending();
    hold(p.grads);
    if (sees) {
      differentiate(ring.stage);
      if constexpr (!kSumsSecond) hide_columns<kMasked>(mask, p.grads);  // otherwise P hides them
    } else {
      clear(p.grads);
    }
    if constexpr (!kAtOnce) {
      if constexpr (kPacksLate) p.start_second_sums(ring.stage);
      put_grads();
      wgmma_wait<0>();
      hold(p.second_out);
    } else {
      hold(p.grads);
      if constexpr (kPending) {
        wgmma_wait<0>();
        leave_pending();
      }
      if constexpr (kSumsSecond) p.pack(p.scores);
      if constexpr (kSumsSecond) p.pack(p.grads, p.packed_grads);
      else p.pack(p.grads);
    }
    if constexpr (kCrowd) {  // other blocks have products meanwhile
      before = ring;
      return finish_pending();
    }
    note_pending();
  }
  __device__ __forceinline__ void note_pending() {
    pending = true;
    before = ring;
    second_before = second;
  }

  template <bool kPending>
  __device__ __forceinline__ void step() {
    if constexpr (kCopies != Copies::both) step<kPending, kCopies == Copies::masked>();
    else if (use() == TileUse::masked) step<kPending, true>();
    else step<kPending, false>();
  }

  // Columns past the end of a sequence become zeros.
  __device__ __forceinline__ void clear_others() const {
    const KeyWalk& walk = smem.tile[ring.stage].walk;
    if (kAdditional && walk.additional) return;
    const int present = columns_of(smem.rows.cell.grid.axis[2]) - walk.origin.at[2];
    if (present >= kColumns) return;
    if constexpr (kSumsFirst) clear_rows(smem.first[ring.stage], present);
    if constexpr (kSumsSecond) {
      await_second(second);
      clear_rows(smem.second[second_stage()], present);
    }
    show_products(kShown + warpgroup);
  }

  __device__ __forceinline__ void run() {
    if (kAdds && smem.tiles == 0) return;
    met = -1;
    if constexpr (kAdds) put_no_grads();
    for (met = 0;; ++met) {
      const bool end = met == smem.tiles;
      if (!end) mbarrier_wait(smem_address(&smem.full[ring.stage]), ring.phase);
      if (end || (!kCrowd && use() == TileUse::skip)) {
        if (kAdds || pending) finish_pending();  // what comes next may need its stage
        if (end) return;
        if constexpr (kAdds) {  // others multiply this dS too
          put_no_grads();
          note_pending();
        } else {
          leave(ring);
          if constexpr (kApart) {
            await_second(second);
            leave_second(second);
          }
        }
      } else {
        if (kOthers && use() == TileUse::masked) clear_others();
        if (!kCrowd && (kAdds || pending)) step<true>();
        else step<false>();
      }
      ring.next();
      second.next();
    }
  }

  template <int kWidth>
  __device__ __forceinline__ bool store(const float (&sums)[kWidth / 2], const Rows& to, float factor, int half) {
    if (to.data == nullptr) return false;
    const int row = first_row() + 8 * half;
    const Position position = position_of(row);
    const Placed placed = place(to, smem.rows.cell, kOfKeys ? smem.rows.cell.first_key : smem.rows.cell.first_query);
    u16* at = static_cast<u16*>(to.data) + placed.row(position, smem.rows.tile.head);
    return store_row<kWidth>(sums, half, factor, box_has(smem.rows.tile, row, position), at);
  }

  // Sums of one of several parts of the heads: backward_convert_keys.cu has their order.
  template <int kWidth>
  __device__ __forceinline__ void store_part(const float (&sums)[kWidth / 2], const Rows& to, int half) {
    constexpr int kPadded = (kWidth + 15) / 16 * 16;
    const int row = first_row() + 8 * half;
    const Position position = position_of(row);
    if (to.data == nullptr || !box_has(smem.rows.tile, row, position)) return;
    const long long first = smem.rows.part * args.key_rows * kPadded;
    float* const at = static_cast<float*>(to.data) + first +
                      place(to, smem.rows.cell, smem.rows.cell.first_key).row(position, smem.rows.tile.head);
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 2) {
      const int i = 4 * n + 2 * half;
      const bool last = n + 1 == kWidth / 8;  // half of the features are none
      *reinterpret_cast<float4*>(at + 8 * n + threadIdx.x % 4 * 4) =
          float4{sums[i], sums[i + 1], last ? 0.0f : sums[i + (last ? 0 : 4)], last ? 0.0f : sums[i + (last ? 0 : 5)]};
    }
  }

  __device__ __forceinline__ void finish(const Sm90BackwardArgs& all) {
    if constexpr (kKeyParts) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kSumsFirst) store_part<kHeadDim>(p.first_out, args.key_sums, half);
        if constexpr (kSumsSecond) store_part<kHeadDimV>(p.second_out, args.value_sums, half);
      }
      return;
    }
    constexpr float kLn2 = 0.693147180559945309f;
    const float first_factor = args.scale_log2 * kLn2;
    u32 wrong[2];
    float finite[2] = {0, 0};
    if constexpr (kStoresBoxes) {
      barrier_sync(kShown, kThreads);  // all warps have multiplied the rows whose place it is
      if (!store_boxes(all, smem, p, first_factor, finite)) return;
      __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Rows& first = kOfKeys ? args.grad_key : args.grad_query;
      bool mine = false;
      if constexpr (kStoresBoxes) {
        const int row = first_row() + 8 * half;
        mine = finite[half] != 0.0f && box_has(smem.rows.tile, row, position_of(row));
      } else {
        if constexpr (kSumsFirst) mine = store<kHeadDim>(p.first_out, first, first_factor, half);
        if constexpr (kSumsSecond) mine = store<kHeadDimV>(p.second_out, args.grad_value, 1.0f, half) || mine;
      }
      wrong[half] = __ballot_sync(~0u, mine);
    }
    if ((wrong[0] | wrong[1]) == 0) return;
    __syncwarp();
    for (int r = 0; r < 16; ++r) {
      if (((r < 8 ? wrong[0] : wrong[1]) >> (4 * (r % 8)) & 0xf) == 0) continue;
      careful_gradients<kOfKeys>(args, smem.rows.cell, smem.rows.tile.head, position_of(threadIdx.x / 32 % 4 * 16 + r));
    }
  }
};

}  // namespace vicus::gpu
