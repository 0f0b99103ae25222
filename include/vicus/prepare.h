// Having the kernels of GPU calls ready before the calls are made. Engine sm80 compiles and loads a kernel when it is
// first needed, which takes up to a second and cannot be part of a CUDA graph; what is prepared is only looked up.
#ifndef VICUS_PREPARE_H_
#define VICUS_PREPARE_H_

#include <optional>

#include "vicus/export.h"
#include "vicus/plan.h"
#include "vicus/tensor.h"

namespace vicus {

/// Calls of one plan, as far as their kernels differ.
struct CallSet {
  bool forward = true, backward = true;
  /// Whether forward calls write the logsumexp; empty: either.
  std::optional<bool> logsumexp = {};
  /// Whether the rows of all tensors of a call start at multiples of 16 bytes, as those of whole tensors do where head
  /// dims have a multiple of 16 bytes; empty: either. Calls with other head dims count as unaligned whatever it says.
  std::optional<bool> aligned = true;
  /// Of `rpb` or `attn_bias`; empty: that of the problem.
  std::optional<DType> bias_dtype = {};
};

/// Compiles (or takes from the disk) and loads every kernel that calls of `calls` need on `device` (-1: that of the calling
/// thread's context, or the first), so that those calls neither compile nor load: required before they are captured into a CUDA graph. Does nothing for the other engines.
/// May be called at any time, also while streams are captured. Throws InvalidArgument for a device that is not there or
/// not what the plan is for, Unsupported where the plan has no backward pass or nothing compiles or runs kernels here,
/// CompileError and DriverError.
VICUS_API void prepare(const Plan& plan, const CallSet& calls = {}, int device = -1);

}  // namespace vicus

#endif  // VICUS_PREPARE_H_
