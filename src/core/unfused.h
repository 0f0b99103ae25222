// What the engines implement of the unfused operators: sums over the slots of a window. `unfused.cc` checks the
// tensors and calls; an engine may trust everything it is given. Tensors are heads last, whatever their order in memory.
#ifndef VICUS_CORE_UNFUSED_H_
#define VICUS_CORE_UNFUSED_H_

#include <array>
#include <cstdint>
#include <span>
#include <variant>

#include "core/domain.h"
#include "vicus/problem.h"
#include "vicus/tensor.h"

namespace vicus {

/// The slots of a query: those of its window, row-major, then the additional tokens.
struct Slots {
  /// Throws InvalidArgument for dense problems, and where scores have 2^63 elements or more.
  explicit Slots(const Problem& problem);

  /// Slot of the key at `k` in the window that begins at `begin`.
  [[nodiscard]] std::int64_t slot(const Position& k, const Position& begin) const {
    return ((k[0] - begin[0]) * extent[1] + k[1] - begin[1]) * extent[2] + k[2] - begin[2];
  }

  std::array<std::int64_t, 3> extent{1, 1, 1};
  std::int64_t window_slots = 1;
};

/// Dot products of a query row with all its keys, into the slots of `scores`: qk forward, and dA of av backward.
/// `unused` fills the slots without a key: -inf or 0.
struct ScoreRows {
  ConstTensorView rows, keys, additional, rpb;
  TensorView scores;
  double unused;
};

/// Sums by the scores: of key rows for each query (av forward, dq of qk backward; with the additional tokens' rows), of query
/// rows for each key (dk, dv) or additional token, and of the scores alone for each distance (gradient of rpb).
struct ScoreSums {
  enum Of : std::uint8_t { queries, keys, additional_tokens, rpb } of;
  ConstTensorView scores, rows, additional;
  TensorView out;
};

using UnfusedStep = std::variant<ScoreRows, ScoreSums>;

struct UnfusedEngine {
  /// The steps of one call, none of which reads what another writes. An engine that may fail to start one starts none.
  void (*run)(const Problem& problem, std::span<const UnfusedStep> steps, void* stream);
};

namespace cpu {
extern const UnfusedEngine kUnfused;
}
namespace gpu {
extern const UnfusedEngine kUnfused;
}

}  // namespace vicus

#endif  // VICUS_CORE_UNFUSED_H_
