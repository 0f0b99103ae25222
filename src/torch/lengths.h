// Packed sequences and key padding, as the operators are given them.
#ifndef VICUS_TORCH_LENGTHS_H_
#define VICUS_TORCH_LENGTHS_H_

#include <cstdint>

#include "torch/tensors.h"
#include "vicus/attention.h"

namespace vicus::binding {

/// Lists of lengths, and the longest packed sequences: part of the problem on the CPU, of the call (which only bounds
/// concern in advance) on a GPU.
struct Lengths {
  const MaybeTensor &keys, &cumulative_q, &cumulative_kv;
  std::int64_t max_q, max_kv;

  /// Throws InvalidArgument on a list of another type, or elsewhere.
  void put(const Place& place, Dense& mask, AttentionInputs& inputs) const;
};

}  // namespace vicus::binding

#endif  // VICUS_TORCH_LENGTHS_H_
