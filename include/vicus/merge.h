// Merging of partial attentions: each part attended to its own share of the keys and kept its logsumexp.
//
//   lse = log(sum_i exp(lse_i)),  output = sum_i exp(lse_i - lse) * output_i
//
// Exact for any split of the keys. A part that saw no key has lse_i = -inf and weight 0, whatever its output holds; if no
// part saw a key, output is 0 and lse -inf. (Milakov and Gimelshein 2018; Dao 2022.)
//
// `engine` is cpu (or automatic, which means cpu) or sm80: then all tensors are device memory, and the work is queued on
// `stream`, a cudaStream_t or CUstream of their device. Arguments are checked before anything is written.
#ifndef VICUS_MERGE_H_
#define VICUS_MERGE_H_

#include <span>

#include "vicus/export.h"
#include "vicus/plan.h"
#include "vicus/tensor.h"

namespace vicus {

/// `outputs[i]` [B, *X, H, Dv] and `logsumexps[i]` [B, *X, H] for any number of parts >= 1, into `output` and
/// `logsumexp` (optional). Outputs share a dtype; logsumexps are float32, or float64 for float64 outputs.
VICUS_API void merge_forward(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps,
                             const TensorView& output, const TensorView& logsumexp = {},
                             Engine engine = Engine::automatic, void* stream = nullptr);

/// Gradients of every part from the gradients of the merged output and (optional) logsumexp. Spans of gradients may be
/// empty, and hold absent views, where they are not wanted.
VICUS_API void merge_backward(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps,
                              const ConstTensorView& grad_output, const ConstTensorView& grad_logsumexp,
                              std::span<const TensorView> grad_outputs, std::span<const TensorView> grad_logsumexps,
                              Engine engine = Engine::automatic, void* stream = nullptr);

}  // namespace vicus

#endif  // VICUS_MERGE_H_
