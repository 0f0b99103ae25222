// Packed sequences and key padding: the lists of one call in device memory, and how long sequences are at most.
#ifndef VICUS_GPU_LISTS_H_
#define VICUS_GPU_LISTS_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "gpu/args.h"
#include "gpu/launch.h"
#include "gpu/rest_args.h"
#include "vicus/attention.h"

namespace vicus::gpu {

/// Tokens that grids are cut from, on three axes: those of the layout, or of the longest sequence.
[[nodiscard]] std::array<int, 3> longest_queries(const Problem& problem);
/// The same for keys.
[[nodiscard]] std::array<int, 3> longest_keys(const Problem& problem);
/// Batch entries, or packed sequences.
[[nodiscard]] std::int64_t sequences_of(const Problem& problem);

/// The lists of a call: those of the inputs, or copies of those of the problem.
class Lists {
 public:
  /// In the context of `device`, which the tensors are on. Throws InvalidArgument on lists elsewhere, Unsupported where
  /// lists would have to be copied while the stream is captured.
  Lists(const Problem& problem, const AttentionInputs& inputs, int device, void* stream);
  void fill(ForwardArgs& args) const;

 private:
  Lists(const std::vector<std::int32_t>& held, const Problem& problem, const AttentionInputs& inputs, int device,
        void* stream);

  Scratch copies_;
  const int *cumulative_queries_ = nullptr, *cumulative_keys_ = nullptr, *key_lengths_ = nullptr;
};

/// A tensor that a call fills.
struct Filled {
  TensorView tensor;
  bool of_keys;
};

/// What of them no packed sequence holds, by lists of the device; absent ones are left out.
[[nodiscard]] RestArgs rests_of(const Problem& problem, const ForwardArgs& args, std::initializer_list<Filled> tensors);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_LISTS_H_
