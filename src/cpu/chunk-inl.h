// Steps over a chunk of scores [key][query] that both passes share: biases, careful sums. For each target.
#if defined(VICUS_CPU_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef VICUS_CPU_CHUNK_INL_H_
#undef VICUS_CPU_CHUNK_INL_H_
#else
#define VICUS_CPU_CHUNK_INL_H_
#endif

#include <bit>
#include <limits>
#include <numbers>

#include "core/numbers.h"
#include "cpu/gemm-inl.h"
#include "cpu/math-inl.h"
#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Scores are kept in powers of two: exp(x) = 2^(x log2 e).
template <class T>
inline constexpr T kLog2E = std::numbers::log2e_v<T>;
template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

// The keys of one query tile inside one packed box.
struct Visit {
  Box sub;  ///< the keys, as positions
  const Run* runs = nullptr;
  int run_count = 0;
  bool masked = false;             ///< some pair is not seen: `masks` decides
  std::uint64_t* masks = nullptr;  ///< per key of `sub`, in order; all active lanes where nothing is masked

  /// Position of key number `index` of `sub`.
  [[nodiscard]] Position position(int index) const {
    const int width = sub.axis[2].size(), height = sub.axis[1].size();
    return {sub.axis[0].begin + index / (width * height), sub.axis[1].begin + index / width % height,
            sub.axis[2].begin + index % width};
  }
};

// Calls `each(run, done)` for the packed keys of a chunk: chunk positions from `done`.
template <class Each>
HWY_INLINE void for_each_run(const Run* runs, int count, const Each& each) {
  int done = 0;
  for (int r = 0; r < count; ++r) {
    each(runs[r], done);
    done += runs[r].len;
  }
}

// Cuts the runs of a visit into chunks of at most `most` keys: calls `each(runs, count, first key, keys)`.
template <class Each>
HWY_INLINE void for_each_chunk(const Visit& visit, int most, const Each& each) {
  Run chunk[kMaxChunkRuns];
  int used = 0, keys = 0, first = 0;
  const auto flush = [&]() HWY_ATTR {
    if (keys > 0) each(static_cast<const Run*>(chunk), used, first, keys);
    first += keys;
    used = keys = 0;
  };
  int total = 0;
  for (int r = 0; r < visit.run_count; ++r) total += visit.runs[r].len;
  const int extent = even_extent(total, most);  // equal chunks
  for (int r = 0; r < visit.run_count; ++r) {
    Run rest = visit.runs[r];
    while (rest.len > 0) {
      const int n = geometry::lo(rest.len, extent - keys);
      chunk[used++] = rest.take(n);
      keys += n;
      if (keys == extent || used == kMaxChunkRuns) flush();
    }
  }
  flush();
}

// bias[key][lane] += relative positional bias * log2 e, for the pairs that are seen. Chunk keys start at `first` of `sub`.
template <class T, class In>
void add_rpb_as(const ConstTensorView& rpb, const RpbMap& map, const Tile& tile, const Visit& visit, int first,
                int keys, int rows, T* bias) {
  tile.for_each_lane([&](int lane, int head, const Position& q) {
    const In* table = static_cast<const In*>(rpb.data()) + head * rpb.stride(0) + map.origin - map.part(q);
    for (int k = 0; k < keys; ++k) {
      if ((visit.masks[first + k] >> lane & 1) == 0) continue;
      const std::int64_t part = map.part(visit.position(first + k));
      double value = 0;
      if constexpr (sizeof(In) == 2) {
        value = load_element(table, rpb.dtype(), part);
      } else {
        value = static_cast<double>(table[part]);
      }
      bias[k * rows + lane] += static_cast<T>(value) * kLog2E<T>;
    }
  });
}

template <class T>
void add_rpb(const ConstTensorView& rpb, const RpbMap& map, const Tile& tile, const Visit& visit, int first, int keys,
             int rows, T* bias) {
  switch (rpb.dtype()) {
    case DType::float64:
      return add_rpb_as<T, double>(rpb, map, tile, visit, first, keys, rows, bias);
    case DType::float32:
      return add_rpb_as<T, float>(rpb, map, tile, visit, first, keys, rows, bias);
    default:
      return add_rpb_as<T, std::uint16_t>(rpb, map, tile, visit, first, keys, rows, bias);
  }
}

// bias[key][lane] += additive mask * log2 e. An entry of -inf hides the pair: its bit in the masks is cleared.
template <class T>
void add_attn_bias(const ConstTensorView& mask, std::int64_t batch, const Tile& tile, const Visit& visit, int first,
                   int keys, int rows, T* bias) {
  tile.for_each_lane([&](int lane, int head, const Position& q) {
    const std::int64_t row = (mask.size(0) == 1 ? 0 : batch * mask.stride(0)) +
                             (mask.size(1) == 1 ? 0 : head * mask.stride(1)) + q[2] * mask.stride(2);
    for (int k = 0; k < keys; ++k) {
      const std::uint64_t bit = std::uint64_t{1} << lane;
      if ((visit.masks[first + k] & bit) == 0) continue;
      const std::int64_t key = visit.sub.axis[2].begin + first + k;
      const double value = load_element(mask.data(), mask.dtype(), row + key * mask.stride(3));
      if (value == -kInfinity<double>) {
        visit.masks[first + k] &= ~bit;
      } else {  // a finite bias hides nothing: the most negative numbers must not become -inf
        constexpr double kLeast = static_cast<double>(std::numeric_limits<T>::lowest()) / 2;
        const double scaled = value * kLog2E<double>;
        bias[k * rows + lane] += static_cast<T>(scaled < kLeast ? kLeast : scaled);  // a NaN stays
      }
    }
  });
}

// The sums of gemm-inl.h where a row of the summed operand is not finite: pairs that are not seen must not reach the
// result, and 0 * NaN would. Slow, and rare: no keys share scores here.
//
// lanes[f][lane] += sum over keys that the lane sees of panel[key][f] * weight[key][lane]
template <class T>
void careful_lanes_add(const Panel<T>& panel, const Run* runs, int run_count, const T* weight,
                       const std::uint64_t* masks, int rows, T* lanes) {
  const hn::ScalableTag<T> d;
  constexpr std::size_t N = kLanes<T>;
  for_each_run(runs, run_count, [&](const Run& run, int done) HWY_ATTR {
    for (int k = 0; k < run.len; ++k) {
      for (std::size_t first = 0; first < static_cast<std::size_t>(rows); first += N) {
        const auto seen = lanes_of(d, masks[done + k], first);
        const auto w = hn::LoadU(d, weight + static_cast<std::size_t>((done + k) * rows) + first);
        for (int f = 0; f < panel.width; ++f) {
          T* place = lanes + static_cast<std::size_t>(f * rows) + first;
          const auto old = hn::LoadU(d, place);
          const auto x = hn::Set(d, panel.at(f / panel.block, run.start + k)[f % panel.block]);
          hn::StoreU(hn::IfThenElse(seen, hn::MulAdd(x, w, old), old), d, place);
        }
      }
    }
  });
}

// sums[key][f] += sum over lanes that see the key of weight[key][lane] * panel[lane][f]
template <class T>
void careful_rows_add(const Panel<T>& panel, const Run* runs, int run_count, const T* weight,
                      const std::uint64_t* masks, int rows, const Panel<T>& sums) {
  for_each_run(runs, run_count, [&](const Run& run, int done) HWY_ATTR {
    for (int k = 0; k < run.len; ++k) {
      for (int lane = 0; lane < rows; ++lane) {
        if ((masks[done + k] >> lane & 1) == 0) continue;
        const T w = weight[(done + k) * rows + lane];
        for (int f = 0; f < panel.width; ++f) {
          sums.at(f / sums.block, run.start + k)[f % sums.block] +=
              w * panel.at(f / panel.block, lane)[f % panel.block];
        }
      }
    }
  });
}

// scores[key][lane] = panel[key] . lanes[:][lane]
template <class T, int kRows>
HWY_INLINE void rows_dot_lanes(const Panel<T>& panel, const Run* runs, int run_count, const T* lanes, T* scores) {
  for_each_run(runs, run_count, [&](const Run& run, int done) HWY_ATTR {
    for (int b = 0; b < panel.block_count; ++b) {
      const Run features = {0, panel.block_width(b), (run.other - run.start) * kBlock, run.others};
      product<T, Walk<kBlock, true>>({.a = panel.at(b, run.start),
                                      .a_step = 1,
                                      .b = lanes + static_cast<std::size_t>(b) * kBlock * kRows,
                                      .b_step = kRows,
                                      .c = scores + static_cast<std::size_t>(done) * kRows,
                                      .c_step = kRows,
                                      .runs = &features,
                                      .run_count = 1,
                                      .init = b == 0 ? Init::zero : Init::keep,
                                      .factor = nullptr},
                                     run.len, kRows / static_cast<int>(kLanes<T>));
    }
  });
}

// lanes[f][lane] = init + sum over keys of panel[key][f] * weight[key][lane]
template <class T, int kRows>
HWY_INLINE void lanes_add_rows(const Panel<T>& panel, const Run* runs, int run_count, const T* weight, Init init,
                               const T* factor, T* lanes) {
  for (int b = 0; b < panel.block_count; ++b) {
    product<T, Walk<1, false>>({.a = panel.at(b, 0),
                                .a_step = static_cast<std::size_t>(panel.block),
                                .b = weight,
                                .b_step = kRows,
                                .c = lanes + static_cast<std::size_t>(b * panel.block) * kRows,
                                .c_step = kRows,
                                .runs = runs,
                                .run_count = run_count,
                                .init = init,
                                .factor = init == Init::scale ? factor : nullptr},
                               panel.block_width(b), kRows / static_cast<int>(kLanes<T>));
  }
}

// Calls `each(begin, end)` for the ranges of lanes in `lanes`.
template <class Each>
HWY_INLINE void for_each_range(std::uint64_t lanes, const Each& each) {
  while (lanes != 0) {
    const int begin = std::countr_zero(lanes), end = begin + std::countr_one(lanes >> begin);
    each(begin, end);
    lanes = end == 64 ? 0 : lanes >> end << end;
  }
}

// sums[key][f] += sum over lanes of weight[key][lane] * panel[lane][f]; features up to whole vectors
template <class T, int kRows>
HWY_INLINE void rows_add_lanes(const Panel<T>& panel, const Run* runs, int run_count, const T* weight,
                               const Panel<T>& sums) {
  constexpr int N = static_cast<int>(kLanes<T>);
  const auto add = [&](int start, int keys, int done, int begin, int end) HWY_ATTR {
    const Run lanes = {0, end - begin};
    for (int b = 0; b < panel.block_count; ++b) {
      product<T, Walk<kRows, true>>(
          {.a = weight + static_cast<std::size_t>(done) * kRows + static_cast<std::size_t>(begin),
           .a_step = 1,
           .b = panel.at(b, begin),
           .b_step = static_cast<std::size_t>(panel.block),
           .c = sums.at(b, start),
           .c_step = static_cast<std::size_t>(sums.block),
           .runs = &lanes,
           .run_count = 1,
           .init = Init::keep,
           .factor = nullptr},
          keys, (panel.block_width(b) + N - 1) / N);
    }
  };
  for_each_run(runs, run_count, [&](const Run& run, int done) HWY_ATTR {
    if (run.others == 0) return add(run.start, run.len, done, 0, kRows);
    // Blocks of lanes that take the first key of a row of scores, then those that take the other.
    constexpr std::uint64_t kAll = ~std::uint64_t{0} >> (64 - kRows);
    for_each_range(kAll & ~run.others, [&](int begin, int end) HWY_ATTR { add(run.start, run.len, done, begin, end); });
    for_each_range(run.others, [&](int begin, int end) HWY_ATTR { add(run.other, run.len, done, begin, end); });
  });
}

}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // VICUS_CPU_CHUNK_INL_H_
