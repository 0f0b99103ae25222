// Neighborhood attention in two halves, with the scores in memory between them: `qk` before a softmax of the caller's,
// `av` after it. For research on scores, attention dropout, and models that publish this form.
//
// Layouts are heads first: query [B, H, *X, D], key [B, Hkv, *X, D], value [B, Hkv, *X, Dv], scores
// [B, H, *X, prod(w) + T], output [B, H, *X, Dv], additional keys [B, Hkv, T, D], additional values [B, Hkv, T, Dv].
// Slots of a query's scores are row-major over its window in ascending key order, additional tokens last. A window with
// fewer than w keys on an axis (causal, or longer than its residue class) leaves the upper slots of that axis unused:
// `qk` writes -inf there, `av` ignores them, and their gradient is zero.
// Scores are not scaled. All tensors share one dtype; the last dimension is contiguous.
//
// `engine` is cpu (or automatic, which means cpu) or sm80: then all tensors are device memory, and the work is queued on
// `stream`, a cudaStream_t or CUstream of their device. Arguments are checked before anything is written: InvalidArgument
// names what is wrong, Unsupported says what an engine does not do. Results are bit-identical from run to run.
#ifndef VICUS_UNFUSED_H_
#define VICUS_UNFUSED_H_

#include <cstdint>

#include "vicus/export.h"
#include "vicus/plan.h"
#include "vicus/problem.h"
#include "vicus/tensor.h"

namespace vicus {

/// Slots of one query's scores: prod(kernel_size) + additional tokens.
[[nodiscard]] VICUS_API std::int64_t score_slots(const Problem& problem);

/// scores[q, slot] = query[q] . key[slot] (+ rpb [H, 2 * w0 - 1, ...] at the slot's offset, window slots only).
VICUS_API void qk_forward(const Neighborhood& mask, const ConstTensorView& query, const ConstTensorView& key,
                          const TensorView& scores, const ConstTensorView& additional_keys = {},
                          const ConstTensorView& rpb = {}, Engine engine = Engine::automatic, void* stream = nullptr);

/// Gradients of `qk_forward`; absent views are not computed.
struct QkGradients {
  TensorView query = {}, key = {}, additional_keys = {}, rpb = {};
};
VICUS_API void qk_backward(const Neighborhood& mask, const ConstTensorView& query, const ConstTensorView& key,
                           const ConstTensorView& grad_scores, const QkGradients& gradients,
                           const ConstTensorView& additional_keys = {}, Engine engine = Engine::automatic,
                           void* stream = nullptr);

/// output[q] = sum over slots of scores[q, slot] * value[slot].
VICUS_API void av_forward(const Neighborhood& mask, const ConstTensorView& scores, const ConstTensorView& value,
                          const TensorView& output, const ConstTensorView& additional_values = {},
                          Engine engine = Engine::automatic, void* stream = nullptr);

/// Gradients of `av_forward`; absent views are not computed.
struct AvGradients {
  TensorView scores = {}, value = {}, additional_values = {};
};
VICUS_API void av_backward(const Neighborhood& mask, const ConstTensorView& scores, const ConstTensorView& value,
                           const ConstTensorView& grad_output, const AvGradients& gradients,
                           const ConstTensorView& additional_values = {}, Engine engine = Engine::automatic,
                           void* stream = nullptr);

}  // namespace vicus

#endif  // VICUS_UNFUSED_H_
