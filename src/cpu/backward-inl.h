// Backward pass of one task. For each target. The kinds of tasks are described in backward.h.
//
// A visit of a query tile to a packed key block, chunk by chunk, queries in lanes (Dao 2022, algorithm 4):
//   S = K Qt, P = 2^(S - lse), dP = V dOt, dS = P * (dP - delta), delta = dO . O - dlse
//   dQt += K dS,   dV += P dO,   dK += dS Q
#if defined(VICUS_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VICUS_CPU_BACKWARD_INL_H_
#undef VICUS_CPU_BACKWARD_INL_H_
#else
#define VICUS_CPU_BACKWARD_INL_H_
#endif

#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/backward.h"
#include "cpu/chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// scores -> P, grad_scores (dP) -> dS. Unseen pairs become 0 in both.
template <class T, int kRows>
void softmax_gradient(T* scores, T* grad_scores, int keys, const T* bias, const std::uint64_t* masks, const T* lse,
                      const T* delta) {
  const hn::ScalableTag<T> d;
  constexpr std::size_t N = kLanes<T>;
  const auto hidden = hn::Set(d, -kInfinity<T>);
  for (std::size_t first = 0; first < kRows; first += N) {
    const auto base = hn::LoadU(d, lse + first);
    const auto shift = hn::LoadU(d, delta + first);
    T* s_column = scores + first;
    T* g_column = grad_scores + first;
    for (int k = 0; k < keys; ++k, s_column += kRows, g_column += kRows) {
      auto s = hn::LoadU(d, s_column);
      if (bias != nullptr) s = hn::Add(s, hn::LoadU(d, bias + static_cast<std::size_t>(k) * kRows + first));
      // Weights are at most 1; rounding of large scores must not make more of them. In this order a NaN stays.
      s = hn::Min(hn::Zero(d), hn::Sub(s, base));
      if (masks != nullptr) {
        const auto seen = lanes_of(d, masks[k], first);
        const auto p = exp2(d, hn::IfThenElse(seen, s, hidden));
        hn::StoreU(p, d, s_column);
        hn::StoreU(hn::IfThenElseZero(seen, hn::Mul(p, hn::Sub(hn::LoadU(d, g_column), shift))), d, g_column);
      } else {
        const auto p = exp2(d, s);
        hn::StoreU(p, d, s_column);
        hn::StoreU(hn::Mul(p, hn::Sub(hn::LoadU(d, g_column), shift)), d, g_column);
      }
    }
  }
}

template <class T, int kRows>
class BackwardTask {
 public:
  BackwardTask(BackwardContext& context, std::byte* scratch)
      : c_(context),
        p_(context.problem),
        plan_(context.plan.backward),
        base_(scratch),
        group_(static_cast<int>(p_.heads / p_.heads_kv)),
        head_tiles_(geometry::ceil_div(group_, plan_.tile.heads)),
        scale_(static_cast<T>(p_.effective_scale())),
        additional_masks_(reinterpret_cast<std::uint64_t*>(scratch + c_.layout.masks)),
        masks_(additional_masks_, reinterpret_cast<std::uint64_t*>(scratch + c_.layout.axis_masks)) {
    const BackwardLayout& l = c_.layout;
    const std::size_t kv = l.capacity * kBlock;
    const int d = static_cast<int>(p_.head_dim), dv = static_cast<int>(p_.head_dim_v);
    keys_ = {at(l.keys), d, kBlock, kv};
    values_ = {at(l.values), dv, kBlock, kv};
    grad_keys_ = {at(l.grad_keys), d, kBlock, kv};
    grad_values_ = {at(l.grad_values), dv, kBlock, kv};
    query_rows_ = {nullptr, d, kBlock, kRows * kBlock};
    grad_out_rows_ = {nullptr, dv, kBlock, kRows * kBlock};
    loaded_ = reinterpret_cast<std::uint8_t*>(base_ + l.loaded);
    scores_ = at(l.scores);
    grad_scores_ = at(l.grad_scores);
    bias_ = at(l.bias);
    row_ = at(l.row);
    runs_ = reinterpret_cast<Run*>(base_ + l.runs);
  }

  void run(std::int64_t task) {
    if (task < c_.segment_tasks) return segment_task(task);
    task -= c_.segment_tasks;
    if (task < c_.border_tasks) return border_task(task);
    additional_task(task - c_.border_tasks);
  }

 private:
  T* at(std::size_t offset) const { return reinterpret_cast<T*>(base_ + offset); }

  // --- The three kinds of tasks. ------------------------------------------------------------------------------------

  void segment_task(std::int64_t task) {
    if (c_.rpb_slots == 0) {
      kv_head_ = task % p_.heads_kv;
      return segment(c_.segments.locate(task / p_.heads_kv), task);
    }
    kv_head_ = task / c_.rpb_slots;
    rpb_sums_ = c_.rpb_sums.data() + task * group_ * c_.rpb_table;
    for (std::int64_t i = task % c_.rpb_slots; i < c_.segments.total(); i += c_.rpb_slots)
      segment(c_.segments.locate(i), task);
  }

  // Says how far a segment is; past all blocks when it ends, however it ends.
  class Progress {
   public:
    explicit Progress(std::atomic<int>* past) : past_(past) {}
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;
    ~Progress() { set(std::numeric_limits<int>::max()); }
    void set(int past) const {
      if (past_ == nullptr) return;
      past_->store(past, std::memory_order_release);
      past_->notify_all();
    }

   private:
    std::atomic<int>* past_;
  };
  // Until the segment before, task `task`, is past block `block`.
  void wait_for(std::int64_t task, int block) {
    std::atomic<int>& past = c_.past[static_cast<std::size_t>(task)];
    for (int now; (now = past.load(std::memory_order_acquire)) <= block;) past.wait(now, std::memory_order_acquire);
  }

  void segment(const CellTasks::Place& place, std::int64_t task) {
    const Progress progress(plan_.relay ? &c_.past[static_cast<std::size_t>(task)] : nullptr);
    if (!start_cell(c_.domain.cell(place.cell))) return;
    std::int64_t index = place.local;
    const int head_pieces = geometry::ceil_div(head_tiles_, plan_.segment_heads);
    first_head_tile_ = static_cast<int>(index % head_pieces) * plan_.segment_heads;
    last_head_tile_ = geometry::lo(first_head_tile_ + plan_.segment_heads, head_tiles_);
    index /= head_pieces;
    Box tiles;  // of the segment
    for (int a = geometry::kRank; a-- > 0;) {
      const auto n = static_cast<std::size_t>(a);
      const int count = geometry::ceil_div(tile_count_[n], plan_.segment[n]);
      tiles.axis[a] = geometry::tile_span(static_cast<int>(index % count), plan_.segment[n], tile_count_[n]);
      index /= count;
    }
    if (index > 0) return;
    const Box queries = queries_of_tiles(tiles);
    const std::size_t slots =
        static_cast<std::size_t>(last_head_tile_ - first_head_tile_) * static_cast<std::size_t>(tiles.volume());
    std::fill_n(at(c_.layout.grad_query), slots * c_.layout.grad_query_step / sizeof(T), T{0});
    std::fill_n(loaded_, slots, std::uint8_t{0});

    sum_queries_ = true;
    const Box hull = geometry::hull(cell_.grid, queries);
    if (!hull.empty()) {
      for_each_box(blocks_over(hull), {1, 1, 1}, [&](const Box& one) HWY_ATTR {
        const Box block = block_box(one);
        const Box seen_by = geometry::queries_of(cell_.grid, block);
        own_keys_ = in_segments(seen_by);  // this one among them: it sees the block
        const int number = one.axis[2].begin;
        const bool first = !plan_.relay || seen_by.axis[2].begin >= queries.axis[2].begin;
        const bool last = !plan_.relay || seen_by.axis[2].end <= queries.axis[2].end;
        if (!first) wait_for(task - p_.heads_kv, number);
        if (start_block(block, first)) visit_tiles(tiles, tiles_over(seen_by));
        end_block(block, last);
        progress.set(number + 1);
      });
    }
    own_keys_ = false;
    if (p_.additional_tokens > 0) {
      for_each_box(all_additional(), {1, 1, additional_extent()}, [&](const Box& block) HWY_ATTR {
        start_additional(block);
        visit_tiles(tiles, tiles);
      });
    }
    if (c_.out.query) store_queries(tiles);
  }

  void all_heads() {
    first_head_tile_ = 0;
    last_head_tile_ = head_tiles_;
  }

  void border_task(std::int64_t task) {
    all_heads();
    kv_head_ = task % p_.heads_kv;
    const CellTasks::Place place = c_.blocks.locate(task / p_.heads_kv);
    start_cell(c_.domain.cell(place.cell));  // keys without queries get zeros too
    std::int64_t index = place.local;
    Box one;
    for (int a = geometry::kRank; a-- > 0;) {
      const auto n = static_cast<std::size_t>(a);
      const int count = geometry::ceil_div(cell_.grid.axis[a].keys, plan_.kv_block[n]);
      if (count == 0) return;
      const int i = static_cast<int>(index % count);
      one.axis[a] = {i, i + 1};
      index /= count;
    }
    if (index > 0) return;
    const Box block = block_box(one);
    const Box seen_by = geometry::queries_of(cell_.grid, block);
    if (in_segments(seen_by)) return;  // they did it
    own_keys_ = true;
    sum_queries_ = false;
    if (start_block(block)) {
      const Box tiles = tiles_over(seen_by);
      visit_tiles(tiles, tiles);
    }
    end_block(block);
  }

  void additional_task(std::int64_t task) {
    all_heads();
    const std::int64_t index = task % c_.additional_blocks;
    kv_head_ = task / c_.additional_blocks % p_.heads_kv;
    const std::int64_t batch = task / c_.additional_blocks / p_.heads_kv;
    const int extent = additional_extent();
    const Box block = {
        {{0, 1}, {0, 1}, geometry::tile_span(static_cast<int>(index), extent, static_cast<int>(p_.additional_tokens))}};
    bool started = false;
    const auto [first, last] = c_.domain.cells_of(batch);
    for (std::int64_t i = first; i < last; ++i) {
      const Cell cell = c_.domain.cell(i);
      const bool any = start_cell(cell);
      if (!started) {
        own_keys_ = true;
        sum_queries_ = false;
        start_additional(block);
        started = true;
      }
      if (!any) continue;
      const Box tiles = {{{0, tile_count_[0]}, {0, tile_count_[1]}, {0, tile_count_[2]}}};
      visit_tiles(tiles, tiles);
    }
    if (!started) {  // no query at all
      zero(grad_keys_, block);
      zero(grad_values_, block);
    }
    if (c_.out.additional_keys) {
      unpack(grad_keys_, scale_, c_.out.additional_keys, additional_row_map(c_.out.additional_keys, batch), block,
             kv_head_);
    }
    if (c_.out.additional_values) {
      unpack(grad_values_, T{1}, c_.out.additional_values, additional_row_map(c_.out.additional_values, batch), block,
             kv_head_);
    }
  }

  // --- Cells, tiles and blocks. -------------------------------------------------------------------------------------

  bool start_cell(const Cell& cell) {
    cell_ = cell;
    bool any = true;
    for (int a = 0; a < geometry::kRank; ++a) {
      const auto n = static_cast<std::size_t>(a);
      tile_count_[n] = geometry::ceil_div(cell.grid.axis[a].queries, plan_.tile.extent[n]);
      any = any && tile_count_[n] > 0;
    }
    return any;
  }

  // Boxes of tile (or block) indices over a box of positions, and back.
  static Box indices_over(const Box& box, const Position& extent) {
    Box out;
    for (int a = 0; a < geometry::kRank; ++a) {
      const int e = extent[static_cast<std::size_t>(a)];
      out.axis[a] = {box.axis[a].begin / e, geometry::ceil_div(box.axis[a].end, e)};
    }
    return box.empty() ? Box{} : out;
  }
  Box tiles_over(const Box& queries) const { return indices_over(queries, plan_.tile.extent); }
  Box blocks_over(const Box& keys) const { return indices_over(keys, plan_.kv_block); }

  Box queries_of_tiles(const Box& tiles) const {
    Box out;
    for (int a = 0; a < geometry::kRank; ++a) {
      const int e = plan_.tile.extent[static_cast<std::size_t>(a)];
      out.axis[a] = {tiles.axis[a].begin * e, geometry::lo(tiles.axis[a].end * e, cell_.grid.axis[a].queries)};
    }
    return out;
  }
  Box block_box(const Box& one) const {
    Box out;
    for (int a = 0; a < geometry::kRank; ++a) {
      out.axis[a] =
          geometry::tile_span(one.axis[a].begin, plan_.kv_block[static_cast<std::size_t>(a)], cell_.grid.axis[a].keys);
    }
    return out;
  }

  // Segments sum the gradients of a block that these queries see.
  bool in_segments(const Box& seen_by) const {
    if (plan_.segment_heads < head_tiles_) return false;
    for (int a = 0; a < geometry::kRank; ++a) {
      const auto n = static_cast<std::size_t>(a);
      if (!cpu::in_segments(seen_by.axis[a], plan_.segment[n] * plan_.tile.extent[n], plan_.relay)) return false;
    }
    return true;
  }

  Box all_additional() const { return {{{0, 1}, {0, 1}, {0, static_cast<int>(p_.additional_tokens)}}}; }
  int additional_extent() const { return static_cast<int>(c_.layout.capacity); }

  // --- Key blocks. --------------------------------------------------------------------------------------------------

  // Packs a block; false when no query sees it. `first`: its gradients begin with zeros, not with what other segments left.
  bool start_block(const Box& block, bool first = true) {
    block_ = block;
    additional_ = false;
    if (own_keys_) {
      zero(grad_keys_, block);
      zero(grad_values_, block);
      if (!first) {
        if (c_.out.key) pack(c_.out.key, row_map(c_.out.key, p_, cell_, cell_.first_key), block, kv_head_, grad_keys_);
        if (c_.out.value)
          pack(c_.out.value, row_map(c_.out.value, p_, cell_, cell_.first_key), block, kv_head_, grad_values_);
      }
    }
    if (geometry::queries_of(cell_.grid, block).empty()) return false;
    finite_keys_ = pack(c_.in.key, row_map(c_.in.key, p_, cell_, cell_.first_key), block, kv_head_, keys_);
    finite_values_ = pack(c_.in.value, row_map(c_.in.value, p_, cell_, cell_.first_key), block, kv_head_, values_);
    return true;
  }

  void start_additional(const Box& block) {
    block_ = block;
    additional_ = true;
    if (own_keys_) {
      zero(grad_keys_, block);
      zero(grad_values_, block);
    }
    finite_keys_ =
        pack(c_.in.additional_keys, additional_row_map(c_.in.additional_keys, cell_.batch), block, kv_head_, keys_);
    finite_values_ = pack(c_.in.additional_values, additional_row_map(c_.in.additional_values, cell_.batch), block,
                          kv_head_, values_);
  }

  // `last`: the gradients are whole, and not yet to be handed on.
  void end_block(const Box& block, bool last = true) {
    if (!own_keys_) return;
    if (c_.out.key)
      unpack(grad_keys_, last ? scale_ : T{1}, c_.out.key, row_map(c_.out.key, p_, cell_, cell_.first_key), block,
             kv_head_);
    if (c_.out.value)
      unpack(grad_values_, T{1}, c_.out.value, row_map(c_.out.value, p_, cell_, cell_.first_key), block, kv_head_);
  }

  static void zero(const Panel<T>& panel, const Box& block) {
    for (int b = 0; b < panel.block_count; ++b) {
      std::fill_n(panel.at(b, 0), static_cast<std::size_t>(block.volume()) * kBlock, T{0});
    }
  }

  // --- Visits. ------------------------------------------------------------------------------------------------------

  // Heads of this task, the tiles of `segment` that lie in `wanted`. What is kept of tiles lies in the order of the segment.
  void visit_tiles(const Box& segment, const Box& wanted) {
    const Box tiles = geometry::intersect(segment, wanted);
    for (int h = first_head_tile_; h < last_head_tile_; ++h) {
      for_each_box(tiles, {1, 1, 1},
                   [&](const Box& one) HWY_ATTR { visit(tile_of(one, h), slot_of(segment, one, h)); });
    }
  }

  Tile tile_of(const Box& one, int h) const {
    Tile tile;
    tile.extent = plan_.tile.extent;
    tile.head = static_cast<int>(kv_head_) * group_ + h * plan_.tile.heads;
    tile.heads = geometry::lo(plan_.tile.heads, group_ - h * plan_.tile.heads);
    tile.box = queries_of_tiles(one);
    return tile;
  }

  std::size_t slot_of(const Box& segment, const Box& one, int h) const {
    auto slot = static_cast<std::size_t>(h - first_head_tile_);
    for (int a = 0; a < geometry::kRank; ++a) {
      slot = slot * static_cast<std::size_t>(segment.axis[a].size()) +
             static_cast<std::size_t>(one.axis[a].begin - segment.axis[a].begin);
    }
    return slot;
  }
  T* grad_query(std::size_t slot) const { return at(c_.layout.grad_query + slot * c_.layout.grad_query_step); }

  void visit(const Tile& tile, std::size_t slot) {
    Visit v;
    v.sub = additional_ ? block_ : geometry::intersect(geometry::hull(cell_.grid, tile.box), block_);
    if (v.sub.empty()) return;
    const bool finite = load_queries(tile, slot) && finite_keys_ && finite_values_;
    const bool biased = !additional_ && (p_.rpb || p_.attn_bias);
    const int fold_axis = kFolds<T, kRows> && finite && !additional_ ? plan_.fold_axis : -1;
    const Fold* fold = &kNoFold;
    v.masked = !finite || (!additional_ && (p_.attn_bias || !geometry::core(cell_.grid, tile.box).contains(v.sub)));
    if (v.masked || biased) {
      if (additional_) {
        v.masks = additional_masks_;
        std::fill_n(v.masks, static_cast<std::size_t>(v.sub.volume()), LaneMasks(tile).active);
      } else {
        v.masks = masks_.of(cell_.grid, tile, v.sub, fold_axis);
        fold = &masks_.fold();
      }
      if (additional_ || p_.attn_bias) masks_.forget();  // written here, or bits cleared by attn_bias
    }
    v.run_count = make_runs(block_, v.sub, runs_, std::numeric_limits<int>::max(), *fold);
    v.runs = runs_;
    for_each_chunk(v, plan_.chunk_keys, [&](const Run* runs, int count, int first, int keys) HWY_ATTR {
      rows_dot_lanes<T, kRows>(keys_, runs, count, query_, scores_);
      rows_dot_lanes<T, kRows>(values_, runs, count, grad_out_, grad_scores_);
      if (biased) {
        std::fill_n(bias_, static_cast<std::size_t>(keys) * kRows, T{0});
        if (p_.rpb) add_rpb(c_.in.rpb, rpb_map(c_.in.rpb, p_), tile, v, first, keys, kRows, bias_);
        if (p_.attn_bias) add_attn_bias(c_.in.attn_bias, cell_.batch, tile, v, first, keys, kRows, bias_);
      }
      const std::uint64_t* masks = v.masked ? v.masks + first : nullptr;
      softmax_gradient<T, kRows>(scores_, grad_scores_, keys, biased ? bias_ : nullptr, masks, lse_, delta_);
      if (own_keys_) sum_keys(runs, count, masks);
      if (!sum_queries_) return;
      if (finite_keys_) {
        lanes_add_rows<T, kRows>(keys_, runs, count, grad_scores_, Init::keep, nullptr, grad_query(slot));
      } else {
        careful_lanes_add(keys_, runs, count, grad_scores_, masks, kRows, grad_query(slot));
      }
      if (rpb_sums_ != nullptr && !additional_) sum_rpb(tile, v, first, keys);
    });
  }

  void sum_keys(const Run* runs, int count, const std::uint64_t* masks) {
    if (finite_grad_out_) {
      rows_add_lanes<T, kRows>(grad_out_rows_, runs, count, scores_, grad_values_);
    } else {
      careful_rows_add(grad_out_rows_, runs, count, scores_, masks, kRows, grad_values_);
    }
    if (finite_query_) {
      rows_add_lanes<T, kRows>(query_rows_, runs, count, grad_scores_, grad_keys_);
    } else {
      careful_rows_add(query_rows_, runs, count, grad_scores_, masks, kRows, grad_keys_);
    }
  }

  void sum_rpb(const Tile& tile, const Visit& v, int first, int keys) {
    const RpbMap map = rpb_map(TensorLayout(p_.rpb_shape()), p_);
    tile.for_each_lane([&](int lane, int head, const Position& q) {
      double* table = rpb_sums_ + (head - kv_head_ * group_) * c_.rpb_table + map.origin - map.part(q);
      for (int k = 0; k < keys; ++k) {
        if ((v.masks[first + k] >> lane & 1) == 0) continue;
        table[map.part(v.position(first + k))] += static_cast<double>(grad_scores_[k * kRows + lane]);
      }
    });
  }

  // Query rows and lanes, dO rows and lanes, lse and delta of a tile. A segment keeps the latter two from its first visit,
  // and the rows and lanes where they have room. Returns whether query and dO were finite.
  bool load_queries(const Tile& tile, std::size_t slot) {
    const BackwardLayout& l = c_.layout;
    const std::size_t kept = sum_queries_ ? slot : 0;
    const std::size_t rows = kept * l.tile_step;
    query_rows_.data = at(l.query_rows + rows);
    grad_out_rows_.data = at(l.grad_out_rows + rows);
    query_ = at(l.query + rows);
    grad_out_ = at(l.grad_out + rows);
    lse_ = at(l.lse + kept * l.row_step);
    delta_ = at(l.delta + kept * l.row_step);
    const std::uint8_t loaded = sum_queries_ ? loaded_[slot] : 0;
    if (loaded == 0 || l.tile_step == 0) load_rows(tile);
    if (loaded == 0) {
      load_sums(tile);
      if (sum_queries_)
        loaded_[slot] = static_cast<std::uint8_t>(1 | (finite_query_ ? 2 : 0) | (finite_grad_out_ ? 4 : 0));
    } else {
      finite_query_ = (loaded & 2) != 0;
      finite_grad_out_ = (loaded & 4) != 0;
    }
    return finite_query_ && finite_grad_out_;
  }

  void load_rows(const Tile& tile) {
    finite_query_ = load_tile(c_.in.query, row_map(c_.in.query, p_, cell_, cell_.first_query), tile, kRows, query_rows_,
                              scale_ * kLog2E<T>, query_);
    finite_grad_out_ = load_tile(c_.grads.grad_output, row_map(c_.grads.grad_output, p_, cell_, cell_.first_query),
                                 tile, kRows, grad_out_rows_, T{1}, grad_out_);
  }

  // lse and delta of a tile whose rows are loaded. Absent lanes get lse = +inf: weight 0.
  void load_sums(const Tile& tile) {
    const hn::ScalableTag<T> d;
    for (int r = 0; r < kRows; ++r) {
      lse_[r] = kInfinity<T>;
      delta_[r] = 0;
    }
    const RowMap lse_map = row_map(c_.grads.logsumexp, p_, cell_, cell_.first_query);
    const RowMap grad_lse_map =
        c_.grads.grad_logsumexp ? row_map(c_.grads.grad_logsumexp, p_, cell_, cell_.first_query) : RowMap{};
    const RowMap out_map = row_map(c_.grads.output, p_, cell_, cell_.first_query);
    tile.for_each_lane([&](int lane, int head, const Position& q) HWY_ATTR {
      const auto lse =
          static_cast<T>(load_element(c_.grads.logsumexp.data(), c_.grads.logsumexp.dtype(), lse_map.row(q, head)));
      if (lse != -kInfinity<T>) lse_[lane] = lse * kLog2E<T>;
      auto sum = hn::Zero(d);
      for (int b = 0; b < grad_out_rows_.block_count; ++b) {
        const int width = grad_out_rows_.block_width(b);
        load_output(out_map.row(q, head) + b * kBlock, width);
        for (int f = 0; f < width; f += static_cast<int>(kLanes<T>)) {
          sum = hn::MulAdd(hn::LoadU(d, row_ + f), hn::LoadU(d, grad_out_rows_.at(b, lane) + f), sum);
        }
      }
      delta_[lane] = hn::GetLane(hn::SumOfLanes(d, sum));
      if (c_.grads.grad_logsumexp) {
        delta_[lane] -= static_cast<T>(
            load_element(c_.grads.grad_logsumexp.data(), c_.grads.grad_logsumexp.dtype(), grad_lse_map.row(q, head)));
      }
    });
  }

  // `width` values of the forward output, from `offset`, into the buffer for a row.
  void load_output(std::int64_t offset, int width) {
    Finite<T> unused;
    const void* base = c_.grads.output.data();
    if constexpr (sizeof(T) == 8) {
      load_row(static_cast<const T*>(base) + offset, width, row_, unused);
    } else {
      switch (c_.grads.output.dtype()) {
        case DType::bfloat16:
          return load_row(static_cast<const BFloat16*>(base) + offset, width, row_, unused);
        case DType::float16:
          return load_row(static_cast<const Float16*>(base) + offset, width, row_, unused);
        default:
          return load_row(static_cast<const T*>(base) + offset, width, row_, unused);
      }
    }
  }

  void store_queries(const Box& tiles) {
    T factor[kRows];
    std::fill_n(factor, kRows, scale_);
    const RowMap map = row_map(c_.out.query, p_, cell_, cell_.first_query);
    for (int h = first_head_tile_; h < last_head_tile_; ++h) {
      for_each_box(tiles, {1, 1, 1}, [&](const Box& one) HWY_ATTR {
        store_tile(grad_query(slot_of(tiles, one, h)), factor, static_cast<int>(p_.head_dim), kRows, c_.out.query, map,
                   tile_of(one, h), scores_);
      });
    }
  }

  BackwardContext& c_;
  const Problem& p_;
  const BackwardPlan& plan_;
  std::byte* base_;
  int group_, head_tiles_;
  T scale_;
  Panel<T> keys_, values_, grad_keys_, grad_values_, query_rows_, grad_out_rows_;
  T *query_, *grad_out_, *lse_, *delta_, *scores_, *grad_scores_, *bias_, *row_;
  std::uint8_t* loaded_;             // of each tile of the segment: 0 before its first visit, then whether it is finite
  std::uint64_t* additional_masks_;  // the same place as masks_
  Masks masks_;
  Run* runs_;

  std::int64_t kv_head_ = 0;
  int first_head_tile_ = 0, last_head_tile_ = 0;  // of the group: what this task visits
  Cell cell_;
  Position tile_count_{};
  double* rpb_sums_ = nullptr;
  Box block_;                // the packed keys
  bool additional_ = false;  // they are additional tokens
  bool own_keys_ = false;    // this task sums dK and dV of the block
  bool sum_queries_ = false;
  bool finite_keys_ = true, finite_values_ = true, finite_query_ = true, finite_grad_out_ = true;
};

template <class T>
void backward_task(BackwardContext& context, std::int64_t task, std::byte* scratch) {
  switch (context.plan.backward.tile.rows) {
    case 16:
      return BackwardTask<T, 16>(context, scratch).run(task);
    case 32:
      return BackwardTask<T, 32>(context, scratch).run(task);
    default:
      return BackwardTask<T, 64>(context, scratch).run(task);
  }
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VICUS_CPU_BACKWARD_INL_H_
