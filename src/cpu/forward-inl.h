// Forward pass of one task: a stack of query tiles of one key/value head over the keys that any of them sees. For each
// target.
//
// Per tile, queries in lanes: Qt [D][rows] (times scale * log2 e), Ot [Dv][rows], running maximum and sum. Keys and values
// are packed once for the stack; each tile takes the keys of its own hull out of what is packed, chunk by chunk: scores,
// mask and bias, online softmax (Milakov and Gimelshein 2018), Ot = Ot * factor + V P. Where windows are folded (tiles.h) a
// row of scores stands for two keys. What is packed is
//   box after box of all keys that the stack sees, for all tiles (`sweep`: wide windows), or
//   a ring of lines of keys that moves with the tiles (`roll`: windows whose hull of a tile fits into scratch memory).
#if defined(VICUS_CPU_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VICUS_CPU_FORWARD_INL_H_
#undef VICUS_CPU_FORWARD_INL_H_
#else
#define VICUS_CPU_FORWARD_INL_H_
#endif

#include <hwy/cache_control.h>
#include <hwy/contrib/math/math-inl.h>

#include "cpu/chunk-inl.h"
#include "cpu/forward.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
struct TileState {
  Tile tile;
  Box hull, core;     // keys that some, and that all, of its queries see
  bool fresh = true;  // nothing summed yet
  T *query, *out, *top, *sum;
};

// Scores of a chunk to weights: adds biases, hides unseen pairs, moves the running maximum and sum. `factor` is what
// earlier sums must be multiplied by.
template <class T, int kRows>
void online_softmax(T* scores, int keys, const T* bias, const std::uint64_t* masks, T* top, T* sum, T* factor) {
  const hn::ScalableTag<T> d;
  constexpr std::size_t N = kLanes<T>;
  const auto hidden = hn::Set(d, -kInfinity<T>);
  for (std::size_t first = 0; first < kRows; first += N) {
    T* column = scores + first;
    auto most = hidden;
    for (int k = 0; k < keys; ++k, column += kRows) {
      auto s = hn::LoadU(d, column);
      if (bias != nullptr) s = hn::Add(s, hn::LoadU(d, bias + static_cast<std::size_t>(k) * kRows + first));
      if (masks != nullptr) s = hn::IfThenElse(lanes_of(d, masks[k], first), s, hidden);
      if (bias != nullptr || masks != nullptr) hn::StoreU(s, d, column);
      most = hn::Max(most, s);
    }
    const auto old = hn::LoadU(d, top + first);
    const auto now = hn::Max(old, most);
    const auto base = hn::IfThenZeroElse(hn::Eq(now, hidden), now);  // a lane that has seen nothing: 2^(-inf - 0)
    column = scores + first;
    auto total = hn::Zero(d);
    for (int k = 0; k < keys; ++k, column += kRows) {
      const auto w = exp2(d, hn::Sub(hn::LoadU(d, column), base));
      hn::StoreU(w, d, column);
      total = hn::Add(total, w);
    }
    const auto f = exp2(d, hn::Sub(old, base));
    hn::StoreU(f, d, factor + first);
    hn::StoreU(hn::MulAdd(hn::LoadU(d, sum + first), f, total), d, sum + first);
    hn::StoreU(now, d, top + first);
  }
}

template <class T>
struct ForwardScratch {
  ForwardScratch(const ForwardContext& c, std::byte* base)
      : keys(at(base, c.layout.keys)),
        values(at(base, c.layout.values)),
        scores(at(base, c.layout.scores)),
        bias(at(base, c.layout.bias)),
        factor(at(base, c.layout.factor)),
        masks(reinterpret_cast<std::uint64_t*>(base + c.layout.masks),
              reinterpret_cast<std::uint64_t*>(base + c.layout.axis_masks)),
        runs(reinterpret_cast<Run*>(base + c.layout.runs)) {}
  static T* at(std::byte* base, std::size_t offset) { return reinterpret_cast<T*>(base + offset); }

  T *keys, *values, *scores, *bias, *factor;
  Masks masks;
  Run* runs;
};

template <class T, int kRows>
class ForwardTask {
 public:
  ForwardTask(const ForwardContext& context, std::byte* scratch)
      : c_(context),
        p_(context.problem),
        plan_(context.plan.forward),
        base_(scratch),
        s_(context, scratch),
        group_(static_cast<int>(p_.heads / p_.heads_kv)) {
    const auto capacity = static_cast<std::size_t>(plan_.pack_keys);
    keys_ = {s_.keys, static_cast<int>(p_.head_dim), kBlock, capacity * kBlock};
    values_ = {s_.values, static_cast<int>(p_.head_dim_v), static_cast<int>(c_.layout.value_width), 0};
  }

  void run(std::int64_t task) {
    const Cell cell = select(task);
    if (tiles_ == 0) return;
    query_map_ = row_map(c_.in.query, p_, cell, cell.first_query);
    key_map_ = row_map(c_.in.key, p_, cell, cell.first_key);
    value_map_ = row_map(c_.in.value, p_, cell, cell.first_key);
    output_map_ = row_map(c_.output, p_, cell, cell.first_query);
    if (c_.logsumexp) logsumexp_map_ = row_map(c_.logsumexp, p_, cell, cell.first_query);
    Box queries;
    for (int a = 0; a < geometry::kRank; ++a) {
      const int extent = plan_.tile.extent[static_cast<std::size_t>(a)], all = cell.grid.axis[a].queries;
      queries.axis[a] = {geometry::tile_span(tile_box_.axis[a].begin, extent, all).begin,
                         geometry::tile_span(tile_box_.axis[a].end - 1, extent, all).end};
    }
    const Box hull = geometry::hull(cell.grid, queries);
    if (plan_.roll_axis >= 0) {
      roll(cell, hull);
    } else {
      sweep(cell, hull);
    }
    if (c_.stream) hwy::FlushStream();  // before another thread is told that the task is done
  }

 private:
  void sweep(const Cell& cell, const Box& hull) {
    for (int t = 0; t < tiles_; ++t) states_[t].tile = tile_of(cell, t);
    fetch_tile(c_.in.query, query_map_, states_[0].tile, p_.head_dim);
    for (int t = 0; t < tiles_; ++t) {
      if (t + 1 < tiles_) fetch_tile(c_.in.query, query_map_, states_[t + 1].tile, p_.head_dim);
      begin_tile(cell, states_[t]);
    }
    for_each_box(hull, pack_extent(hull, plan_.pack_keys), [&](const Box& box) HWY_ATTR {
      pack(c_.in.key, key_map_, box, kv_head_, keys_);
      finite_ = pack(c_.in.value, value_map_, box, kv_head_, values_);
      for (int t = 0; t < tiles_; ++t) visit(cell, states_[t], box);
    });
    if (p_.additional_tokens > 0) additional(cell);
    for (int t = 0; t < tiles_; ++t) end_tile(states_[t]);
  }

  // A line is what `hull` holds at one position of the axis that the ring moves along. Tiles come in the order of that axis,
  // so the lines they need only ever move forward.
  void roll(const Cell& cell, const Box& hull) {
    const int axis = plan_.roll_axis;
    int line = 1;
    for (int a = 0; a < geometry::kRank; ++a) line *= a == axis ? 1 : hull.axis[a].size();
    const bool adjacent = axis != 1 || hull.axis[0].size() == 1;  // lines as they lie in the tensor
    ring_ = plan_.pack_keys / line * line;
    finite_ = true;
    const int origin = hull.axis[axis].begin;
    int packed = origin;  // lines before are packed
    TileState<T>& s = states_[0];
    Tile next = tile_of(cell, 0);
    for (int t = 0; t < tiles_; ++t) {
      s.tile = next;
      begin_tile(cell, s);
      if (t + 1 < tiles_) {
        next = tile_of(cell, t + 1);
        fetch_tile(c_.in.query, query_map_, next, p_.head_dim);
      }
      while (packed < s.hull.axis[axis].end) {  // up to the end of the ring, then from its start
        const int row = (packed - origin) * line % ring_;
        Box lines = hull;
        const int most = adjacent ? (ring_ - row) / line : 1;
        lines.axis[axis] = {packed, geometry::lo(packed + most, s.hull.axis[axis].end)};
        pack(c_.in.key, key_map_, lines, kv_head_, keys_, row);
        finite_ = pack(c_.in.value, value_map_, lines, kv_head_, values_, row) && finite_;
        packed = lines.axis[axis].end;
      }
      visit(cell, s, hull);
      end_tile(s);
    }
  }

  // Cell and tiles of a task.
  Cell select(std::int64_t task) {
    tiles_ = 0;
    kv_head_ = task % p_.heads_kv;
    task /= p_.heads_kv;
    const int head_block = static_cast<int>(task % c_.head_blocks);
    head_tiles_ = geometry::tile_span(head_block, plan_.stack_heads, c_.head_tiles);
    const CellTasks::Place place = c_.blocks.locate(task / c_.head_blocks);
    const Cell cell = c_.domain.cell(place.cell);
    std::int64_t count = 1;
    for (int a = 0; a < geometry::kRank; ++a) count *= c_.block_count(cell, a);
    if (place.local >= count) return cell;
    // From the last block to the first: with a causal mask the longest work starts first.
    std::int64_t block = count - 1 - place.local;
    tiles_ = head_tiles_.size();
    for (int a = geometry::kRank; a-- > 0;) {
      const int at = static_cast<int>(block % c_.block_count(cell, a));
      block /= c_.block_count(cell, a);
      tile_box_.axis[a] = geometry::tile_span(at, plan_.stack[static_cast<std::size_t>(a)], c_.tile_count(cell, a));
      tiles_ *= tile_box_.axis[a].size();
    }
    return cell;
  }

  // Tile number `index` of the task: over its box, the axis that a ring moves along outermost, the tiles of its heads
  // innermost.
  Tile tile_of(const Cell& cell, int index) const {
    Tile tile;
    tile.extent = plan_.tile.extent;
    const int h = head_tiles_.begin + index % head_tiles_.size();
    index /= head_tiles_.size();
    tile.head = static_cast<int>(kv_head_) * group_ + h * plan_.tile.heads;
    tile.heads = geometry::lo(plan_.tile.heads, group_ - h * plan_.tile.heads);
    for (const int a : {2, plan_.roll_axis == 1 ? 0 : 1, plan_.roll_axis == 1 ? 1 : 0}) {
      const int size = tile_box_.axis[a].size();
      tile.box.axis[a] = geometry::tile_span(tile_box_.axis[a].begin + index % size,
                                             tile.extent[static_cast<std::size_t>(a)], cell.grid.axis[a].queries);
      index /= size;
    }
    return tile;
  }

  void begin_tile(const Cell& cell, TileState<T>& s) {
    const auto t = static_cast<std::size_t>(&s - states_);
    const ForwardLayout& l = c_.layout;
    s.query = ForwardScratch<T>::at(base_, l.query + t * l.query_step);
    s.out = ForwardScratch<T>::at(base_, l.out + t * l.out_step);
    s.top = ForwardScratch<T>::at(base_, l.top + t * l.row_step);
    s.sum = ForwardScratch<T>::at(base_, l.sum + t * l.row_step);
    s.fresh = true;
    s.hull = geometry::hull(cell.grid, s.tile.box);
    s.core = geometry::core(cell.grid, s.tile.box);
    for (int r = 0; r < kRows; ++r) {
      s.top[r] = -kInfinity<T>;
      s.sum[r] = 0;
    }
    // The score buffer is free now and holds a piece of rows.
    const Panel<T> piece = {s_.scores, static_cast<int>(p_.head_dim), kBlock, 0};
    load_tile(c_.in.query, query_map_, s.tile, kRows, piece, static_cast<T>(p_.effective_scale()) * kLog2E<T>, s.query);
  }

  void visit(const Cell& cell, TileState<T>& s, const Box& packed) {
    Visit v;
    v.sub = geometry::intersect(s.hull, packed);
    if (v.sub.empty()) return;
    v.masked = !s.core.contains(v.sub);
    const bool biased = p_.rpb || p_.attn_bias;
    const int fold_axis = kFolds<T, kRows> && finite_ ? plan_.fold_axis : -1;
    if (v.masked || !finite_ || biased) v.masks = s_.masks.of(cell.grid, s.tile, v.sub, fold_axis);
    v.run_count =
        make_runs(packed, v.sub, s_.runs, ring_, v.masks == nullptr ? kNoFold : s_.masks.fold(), plan_.roll_axis == 1);
    v.runs = s_.runs;
    if (p_.attn_bias) {  // clears bits of the masks
      v.masked = true;
      s_.masks.forget();
    }
    attend(cell, s, v, finite_, biased);
  }

  void additional(const Cell& cell) {
    const Box all = {{{0, 1}, {0, 1}, {0, static_cast<int>(p_.additional_tokens)}}};
    const RowMap key_map = additional_row_map(c_.in.additional_keys, cell.batch);
    const RowMap value_map = additional_row_map(c_.in.additional_values, cell.batch);
    for_each_box(all, pack_extent(all, plan_.pack_keys), [&](const Box& box) HWY_ATTR {
      pack(c_.in.additional_keys, key_map, box, kv_head_, keys_);
      pack(c_.in.additional_values, value_map, box, kv_head_, values_);
      for (int t = 0; t < tiles_; ++t) {
        Visit v;
        v.sub = box;
        v.run_count = make_runs(box, box, s_.runs);
        v.runs = s_.runs;
        attend(cell, states_[t], v, true, false);  // every lane sees every key: nothing to be careful about
      }
    });
  }

  void attend(const Cell& cell, TileState<T>& s, const Visit& v, bool finite, bool biased) {
    for_each_chunk(v, plan_.chunk_keys, [&](const Run* runs, int count, int first, int keys) HWY_ATTR {
      rows_dot_lanes<T, kRows>(keys_, runs, count, s.query, s_.scores);
      if (biased) {
        std::fill_n(s_.bias, static_cast<std::size_t>(keys) * kRows, T{0});
        if (p_.rpb) add_rpb(c_.in.rpb, rpb_map(c_.in.rpb, p_), s.tile, v, first, keys, kRows, s_.bias);
        if (p_.attn_bias) add_attn_bias(c_.in.attn_bias, cell.batch, s.tile, v, first, keys, kRows, s_.bias);
      }
      const std::uint64_t* masks = v.masks == nullptr ? nullptr : v.masks + first;
      online_softmax<T, kRows>(s_.scores, keys, biased ? s_.bias : nullptr, v.masked ? masks : nullptr, s.top, s.sum,
                               s_.factor);
      if (finite) {
        lanes_add_rows<T, kRows>(values_, runs, count, s_.scores, s.fresh ? Init::zero : Init::scale, s_.factor, s.out);
      } else {
        rescale(s);
        careful_lanes_add(values_, runs, count, s_.scores, masks, kRows, s.out);
      }
      s.fresh = false;
    });
  }

  void rescale(TileState<T>& s) const {
    for (int f = 0; f < values_.width; ++f) {
      for (int r = 0; r < kRows; ++r) {
        T& x = s.out[f * kRows + r];
        x = s.fresh ? T{0} : x * s_.factor[r];
      }
    }
  }

  void end_tile(TileState<T>& s) {
    for (int r = 0; r < kRows; ++r) s_.factor[r] = s.sum[r] == 0 ? T{0} : T{1} / s.sum[r];
    if (s.fresh) std::fill_n(s.out, static_cast<std::size_t>(values_.width) * kRows, T{0});
    store_tile(s.out, s_.factor, values_.width, kRows, c_.output, output_map_, s.tile, s_.scores, c_.stream);
    if (!c_.logsumexp) return;
    const hn::ScalableTag<T> d;
    for (std::size_t r = 0; r < kRows; r += kLanes<T>) {
      const auto sum = hn::LoadU(d, s.sum + r);
      const auto lse = hn::MulAdd(hn::LoadU(d, s.top + r), hn::Set(d, std::numbers::ln2_v<T>), hn::Log(d, sum));
      const auto none = hn::Set(d, -kInfinity<T>);
      const auto seen = hn::IfThenElse(hn::IsNaN(sum), sum, lse);  // Highway's Log takes no NaN
      hn::StoreU(hn::IfThenElse(hn::Eq(sum, hn::Zero(d)), none, seen), d, s.top + r);
    }
    s.tile.for_each_lane([&](int lane, int head, const Position& q) {
      store_element(c_.logsumexp.data(), c_.logsumexp.dtype(), logsumexp_map_.row(q, head),
                    static_cast<double>(s.top[lane]));
    });
  }

  const ForwardContext& c_;
  const Problem& p_;
  const ForwardPlan& plan_;
  std::byte* base_;
  ForwardScratch<T> s_;
  int group_;
  RowMap query_map_, key_map_, value_map_, output_map_, logsumexp_map_;
  std::int64_t kv_head_ = 0;
  Span head_tiles_{};  // of the task, among the tiles of the group's heads
  Box tile_box_{};     // of the task, in tiles
  int tiles_ = 0;
  Panel<T> keys_, values_;
  int ring_ = std::numeric_limits<int>::max();
  bool finite_ = true;  // all values packed so far
  TileState<T> states_[kMaxStack];
};

template <class T>
void forward_task(const ForwardContext& context, std::int64_t task, std::byte* scratch) {
  switch (context.plan.forward.tile.rows) {
    case 16:
      return ForwardTask<T, 16>(context, scratch).run(task);
    case 32:
      return ForwardTask<T, 32>(context, scratch).run(task);
    default:
      return ForwardTask<T, 64>(context, scratch).run(task);
  }
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VICUS_CPU_FORWARD_INL_H_
