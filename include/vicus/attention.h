// The fused operators: softmax(scale * query . key + bias) . value over the keys of each query's mask.
//
// Layouts are heads last (problem.h names the shapes); the last dimension of every tensor is contiguous, other strides
// are free. Outputs are the caller's memory and are written whole; inputs are read in place. A query that sees no key has
// output 0, logsumexp -inf and zero gradients. NaN and Inf outside a query's window never reach its output or gradients.
//
// Thread-safe: calls may run at the same time on different outputs. Everything is checked before anything is written;
// errors are InvalidArgument and Unsupported (error.h). Results are bit-identical from run to run of a plan.
#ifndef VICUS_ATTENTION_H_
#define VICUS_ATTENTION_H_

#include <cstdint>
#include <optional>
#include <span>

#include "vicus/export.h"
#include "vicus/plan.h"
#include "vicus/problem.h"
#include "vicus/tensor.h"

namespace vicus {

/// Inputs. What the problem does not ask for stays absent.
struct AttentionInputs {
  ConstTensorView query = {};              ///< [B, *X, H, D]
  ConstTensorView key = {};                ///< [B, *X, Hkv, D]; dense [B, Sk, Hkv, D]
  ConstTensorView value = {};              ///< [B, *X, Hkv, Dv]; dense [B, Sk, Hkv, Dv]
  ConstTensorView additional_keys = {};    ///< [B, T, Hkv, D]
  ConstTensorView additional_values = {};  ///< [B, T, Hkv, Dv]
  ConstTensorView rpb = {};        ///< [H, 2 * w0 - 1, ...], of the problem's dtype, float32 or float64; any strides
  ConstTensorView attn_bias = {};  ///< [B or 1, H or 1, Sq, Sk], any dtype and strides
  /// Lists of a problem with `Dense::device`, int32 in memory of the GPU that the tensors are on. They are read when the
  /// stream gets there: memory and contents must stay until then.
  std::span<const std::int32_t> cumulative_queries = {};  ///< [device.sequences + 1]
  std::span<const std::int32_t> cumulative_keys = {};     ///< [device.sequences + 1]
  std::span<const std::int32_t> key_lengths = {};         ///< [B]
};

/// Computes `output` [B, *X, H, Dv] and, if present, `logsumexp` [B, *X, H] (natural logarithm; float32, or float64 when
/// the problem is float64). Engines sm80 and sm90: all tensors are device memory, and the work is queued on `stream`, a
/// cudaStream_t or CUstream of their device: of the thread's context if that is one of this device, else of the primary
/// context. Lists that a problem itself holds (Dense::key_lengths, ...) are copied to the device by every call, which
/// cannot be captured into a CUDA graph: see `Dense::device`.
VICUS_API void forward(const Plan& plan, const AttentionInputs& inputs, const TensorView& output,
                       const TensorView& logsumexp = {}, void* stream = nullptr);

/// What the forward call left, and the gradients that arrive.
struct AttentionGradInputs {
  ConstTensorView output = {};          ///< [B, *X, H, Dv]
  ConstTensorView logsumexp = {};       ///< [B, *X, H], float32 or float64 as in `forward`
  ConstTensorView grad_output = {};     ///< [B, *X, H, Dv]
  ConstTensorView grad_logsumexp = {};  ///< [B, *X, H], optional, dtype of `logsumexp`
};

/// Gradients to compute; an absent view is not computed.
struct AttentionGradients {
  TensorView query = {}, key = {}, value = {};              ///< shapes of the inputs
  TensorView additional_keys = {}, additional_values = {};  ///< shapes of the inputs
  TensorView rpb = {};                                      ///< shape and dtype of the input
};

/// Computes gradients of all inputs that `gradients` holds. attn_bias has no gradient. `stream` as in `forward`.
VICUS_API void backward(const Plan& plan, const AttentionInputs& inputs, const AttentionGradInputs& grad_inputs,
                        const AttentionGradients& gradients, void* stream = nullptr);

/// Plans and computes neighborhood attention in one call: rank, sizes and dtype come from the tensors.
VICUS_API void neighborhood_attention(const ConstTensorView& query, const ConstTensorView& key,
                                      const ConstTensorView& value, const TensorView& output, const Neighborhood& mask,
                                      std::optional<double> scale = {}, const TensorView& logsumexp = {});

/// Plans and computes dense attention in one call; `mask.keys` is taken from `key`.
VICUS_API void attention(const ConstTensorView& query, const ConstTensorView& key, const ConstTensorView& value,
                         const TensorView& output, const Dense& mask = {}, std::optional<double> scale = {},
                         const TensorView& logsumexp = {});

}  // namespace vicus

#endif  // VICUS_ATTENTION_H_
