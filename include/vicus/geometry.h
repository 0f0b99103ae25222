// Windows, hulls, tile classes and exact counts of work: the only place that knows them.
//
// Everything here is constexpr integer code without an include, so that the host compiler and NVRTC compile the same
// text. One axis at a time: a mask over several axes is the conjunction of its axes, so boxes classify axis by axis and
// counts multiply. The definition is the one of the design page:
//
//   neighborhood  leader l = min((p / step) * step + step / 2, L - 1); the window is `win` keys around l, shifted inward
//                 at the edges; causal: l = min((p / step) * step + step - 1, L - 1), keys [max(l - win + 1, 0), p + 1).
//   band          (dense attention) keys [p + offset - left, p + offset + right], clipped; unbounded sides see all.
//
// Positions count inside a residue class of the dilation (see `class_len`, `token_of`); an `Axis` never knows dilation.
//
// Two facts carry the rest, both enumerated in tests/geometry: begin and end of `window` never decrease with the query,
// and the windows of consecutive queries overlap or touch. Hence the keys that a span of queries sees are one span
// (`hull`), the keys that all of them see are one span (`core`), and the queries that see a key span are one span
// (`queries_of`). The first two are ends of windows, the third is `window` solved for the query, enumerated there, too.
#ifndef VICUS_GEOMETRY_H_
#define VICUS_GEOMETRY_H_

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define VICUS_GEOM __host__ __device__ constexpr
#else
#define VICUS_GEOM constexpr
#endif

namespace vicus::geometry {

/// Counts of (query, key) pairs: wider than any position.
using Count = long long;

/// Longest axis and widest bound: sums of a position and an extent stay inside an int.
inline constexpr int kMaxLen = 1 << 29;

/// Every problem is stored with this many axes; unused leading axes have length one.
inline constexpr int kRank = 3;

VICUS_GEOM int lo(int a, int b) { return a < b ? a : b; }
VICUS_GEOM int hi(int a, int b) { return a < b ? b : a; }
/// `x` may be a sum of positions and bounds that no int holds.
VICUS_GEOM int clamp(Count x, int least, int most) {
  return x < least ? least : x > most ? hi(least, most) : static_cast<int>(x);
}
VICUS_GEOM int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Positions [begin, end).
struct Span {
  int begin = 0, end = 0;
  VICUS_GEOM int size() const { return end - begin; }
  VICUS_GEOM bool empty() const { return end <= begin; }
  VICUS_GEOM bool contains(int p) const { return begin <= p && p < end; }
  VICUS_GEOM bool contains(Span s) const { return begin <= s.begin && s.end <= end; }
  friend VICUS_GEOM bool operator==(Span a, Span b) { return a.begin == b.begin && a.end == b.end; }
};

VICUS_GEOM Span intersect(Span a, Span b) {
  const int begin = hi(a.begin, b.begin);
  return {begin, hi(begin, lo(a.end, b.end))};
}

/// One axis of one residue class. Made by `neighborhood_axis` and `band_axis`; `len` in their arguments are positions.
struct Axis {
  int queries = 1, keys = 1;
  int win = 1, step = 1;  // neighborhood: 1 <= step <= win
  bool causal = false;    // neighborhood
  bool band = false;      // dense attention: the four fields below instead of the three above
  bool left_open = true, right_open = true;
  int left = 0, right = 0, offset = 0;
};

VICUS_GEOM Axis neighborhood_axis(int len, int win, int step, bool causal) {
  Axis a;
  a.queries = a.keys = len;
  a.win = win;
  a.step = step;
  a.causal = causal;
  return a;
}

/// Query p sees keys [p + offset - left, p + offset + right] of `keys`; a negative `left` or `right` has no bound.
VICUS_GEOM Axis band_axis(int queries, int keys, int left, int right, int offset) {
  Axis a;
  a.band = true;
  a.queries = queries;
  a.keys = keys;
  a.left_open = left < 0;
  a.right_open = right < 0;
  a.left = left;
  a.right = right;
  a.offset = offset;
  return a;
}

/// Keys that query `p` sees on this axis. Possibly empty only on a band axis.
VICUS_GEOM Span window(const Axis& a, int p) {
  if (a.band) {
    const Count center = static_cast<Count>(p) + a.offset;
    const int begin = a.left_open ? 0 : clamp(center - a.left, 0, a.keys);
    const int end = a.right_open ? a.keys : clamp(center + a.right + 1, 0, a.keys);
    return {begin, end};
  }
  const int group = p / a.step * a.step;
  const int leader = lo(group + (a.causal ? a.step - 1 : a.step / 2), a.keys - 1);
  if (a.causal) return {hi(leader - a.win + 1, 0), p + 1};
  const int begin = lo(hi(leader - a.win / 2, 0), hi(a.keys - a.win, 0));
  return {begin, lo(begin + a.win, a.keys)};
}

/// Keys that at least one query of `q` sees.
VICUS_GEOM Span hull(const Axis& a, Span q) {
  if (q.empty()) return {0, 0};
  return {window(a, q.begin).begin, window(a, q.end - 1).end};
}

/// Keys that every query of `q` sees.
VICUS_GEOM Span core(const Axis& a, Span q) {
  if (q.empty()) return {0, a.keys};
  return intersect({window(a, q.end - 1).begin, window(a, q.begin).end}, {0, a.keys});
}

/// The first query whose window begins at key `key` or after it: `window` solved for the query. All of them where none does.
VICUS_GEOM int first_beginning_at(const Axis& a, int key) {
  if (key <= 0) return 0;
  if (a.band) {
    if (a.left_open || key > a.keys) return a.queries;
    return clamp(static_cast<Count>(key) - a.offset + a.left, 0, a.queries);
  }
  if (key > a.keys - a.win) return a.queries;
  const int before = a.causal ? a.win - a.step : a.win / 2 - a.step / 2;  // keys of a window before its group
  return lo(ceil_div(key + before, a.step) * a.step, a.queries);
}

/// Queries that see at least one key of `k`.
VICUS_GEOM Span queries_of(const Axis& a, Span k) {
  if (k.empty()) return {0, 0};
  int first = 0;  // whose window ends after k.begin
  if (k.begin >= a.keys) first = a.queries;
  else if (a.band) first = a.right_open ? 0 : clamp(static_cast<Count>(k.begin) - a.offset - a.right, 0, a.queries);
  else first = a.causal ? hi(k.begin, 0) : first_beginning_at(a, k.begin - a.win + 1);
  return {first, hi(first, first_beginning_at(a, k.end))};
}

/// Queries that see every key of `k`.
VICUS_GEOM Span queries_of_all(const Axis& a, Span k) {
  if (k.empty()) return {0, a.queries};
  return intersect({queries_of(a, {k.end - 1, k.end}).begin, queries_of(a, {k.begin, k.begin + 1}).end},
                   {0, a.queries});
}

enum class TileClass { empty, partial, full };

/// Of the pairs in q x k: none seen, some seen, all seen. Exact.
VICUS_GEOM TileClass classify(const Axis& a, Span q, Span k) {
  if (q.empty() || k.empty() || intersect(hull(a, q), k).empty()) return TileClass::empty;
  return core(a, q).contains(k) ? TileClass::full : TileClass::partial;
}

/// A box of positions, and the axes of one residue class.
struct Box {
  Span axis[kRank];
  VICUS_GEOM bool empty() const { return axis[0].empty() || axis[1].empty() || axis[2].empty(); }
  VICUS_GEOM Count volume() const {
    return empty() ? 0 : static_cast<Count>(axis[0].size()) * axis[1].size() * axis[2].size();
  }
  VICUS_GEOM bool contains(const Box& b) const {
    return axis[0].contains(b.axis[0]) && axis[1].contains(b.axis[1]) && axis[2].contains(b.axis[2]);
  }
  friend VICUS_GEOM bool operator==(const Box& a, const Box& b) {
    return a.axis[0] == b.axis[0] && a.axis[1] == b.axis[1] && a.axis[2] == b.axis[2];
  }
};

struct Grid {
  Axis axis[kRank];
};

VICUS_GEOM Box hull(const Grid& g, const Box& q) {
  return {{hull(g.axis[0], q.axis[0]), hull(g.axis[1], q.axis[1]), hull(g.axis[2], q.axis[2])}};
}

VICUS_GEOM Box core(const Grid& g, const Box& q) {
  return {{core(g.axis[0], q.axis[0]), core(g.axis[1], q.axis[1]), core(g.axis[2], q.axis[2])}};
}

VICUS_GEOM Box queries_of(const Grid& g, const Box& k) {
  return {{queries_of(g.axis[0], k.axis[0]), queries_of(g.axis[1], k.axis[1]), queries_of(g.axis[2], k.axis[2])}};
}

VICUS_GEOM Box intersect(const Box& a, const Box& b) {
  return {{intersect(a.axis[0], b.axis[0]), intersect(a.axis[1], b.axis[1]), intersect(a.axis[2], b.axis[2])}};
}

VICUS_GEOM TileClass classify(const Grid& g, const Box& q, const Box& k) {
  bool full = true;
  for (int i = 0; i < kRank; ++i) {
    const TileClass c = classify(g.axis[i], q.axis[i], k.axis[i]);
    if (c == TileClass::empty) return c;
    full = full && c == TileClass::full;
  }
  return full ? TileClass::full : TileClass::partial;
}

/// Tile `index` of an axis of `len` positions cut into tiles of `extent`; the last one may be ragged.
VICUS_GEOM Span tile_span(int index, int extent, int len) {
  return {lo(index * extent, len), lo(index * extent + extent, len)};
}

// --- Dilation: residue classes. Token i is position i / d of class i % d. -------------------------------------------

VICUS_GEOM int class_len(int len, int dilation, int residue) {
  return residue >= len ? 0 : (len - residue + dilation - 1) / dilation;
}
VICUS_GEOM int token_of(int position, int dilation, int residue) { return position * dilation + residue; }

// --- Exact counts on one axis; the count of a grid is the product over its axes. ------------------------------------

/// Pairs of the mask.
VICUS_GEOM Count mask_pairs(const Axis& a) {
  Count n = 0;
  for (int p = 0; p < a.queries; ++p) n += window(a, p).size();
  return n;
}

/// Pairs computed when queries go in tiles of `tile_q` (ragged tiles padded to it) and each tile takes its hull, rounded
/// up to whole tiles of `tile_kv` keys that begin where the hull begins.
VICUS_GEOM Count tile_pairs(const Axis& a, int tile_q, int tile_kv) {
  Count n = 0;
  for (int q = 0; q < a.queries; q += tile_q) {
    const int keys = hull(a, {q, lo(q + tile_q, a.queries)}).size();
    n += static_cast<Count>(tile_q) * ceil_div(keys, tile_kv) * tile_kv;
  }
  return n;
}

/// Tiles of each class when queries and keys are both cut into fixed tiles from position 0.
struct TileCounts {
  Count empty = 0, partial = 0, full = 0;
};
VICUS_GEOM TileCounts tile_counts(const Axis& a, int tile_q, int tile_kv) {
  TileCounts n;
  for (int q = 0; q < a.queries; q += tile_q) {
    const Span tile = {q, lo(q + tile_q, a.queries)};
    for (int k = 0; k < a.keys; k += tile_kv) {
      const TileClass c = classify(a, tile, {k, lo(k + tile_kv, a.keys)});
      ++(c == TileClass::empty ? n.empty : c == TileClass::partial ? n.partial : n.full);
    }
  }
  return n;
}

}  // namespace vicus::geometry

#endif  // VICUS_GEOMETRY_H_
