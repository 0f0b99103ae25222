// What the engines implement of the unfused operators: five sums over the slots of a window. `unfused.cc` checks the
// tensors and calls; an engine may trust everything it is given. Tensors are heads last, whatever their order in memory.
#ifndef VICUS_CORE_UNFUSED_H_
#define VICUS_CORE_UNFUSED_H_

#include <array>
#include <cstdint>

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

struct UnfusedEngine {
  void (*scores)(const Problem& problem, const ScoreRows& rows, void* stream);
  /// Sums of key rows by the scores of a query: av forward, and dq of qk backward.
  void (*to_queries)(const Problem& problem, const ConstTensorView& scores, const ConstTensorView& keys,
                     const ConstTensorView& additional, const TensorView& out, void* stream);
  /// Sums of query rows by the scores a key has with them: dk of qk backward, and dv of av backward.
  void (*to_keys)(const Problem& problem, const ConstTensorView& scores, const ConstTensorView& rows,
                  const TensorView& out, void* stream);
  /// The same for the additional tokens, which every query of the batch entry sees.
  void (*to_additional)(const Problem& problem, const ConstTensorView& scores, const ConstTensorView& rows,
                        const TensorView& out, void* stream);
  /// Gradient of rpb.
  void (*to_rpb)(const Problem& problem, const ConstTensorView& scores, const TensorView& out, void* stream);
};

namespace cpu {
extern const UnfusedEngine kUnfused;
}
namespace gpu {
extern const UnfusedEngine kUnfused;
}

}  // namespace vicus

#endif  // VICUS_CORE_UNFUSED_H_
