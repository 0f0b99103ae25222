// Which kernels a call launches: the one list behind the calls themselves, `prepare` and `compile`.
#ifndef VICUS_GPU_KERNELS_H_
#define VICUS_GPU_KERNELS_H_

#include <array>
#include <cstddef>
#include <vector>

#include "gpu/spec.h"
#include "vicus/prepare.h"

namespace vicus::gpu {

/// What of a call, besides its plan, its kernels depend on.
struct Call {
  bool backward = false;
  bool logsumexp = true;  ///< forward: it is written
  bool vectors = true;    ///< rows of all tensors start at multiples of 16 bytes
  bool boxes = true;      ///< and the copy engine can address those of the inputs
  DType bias_type = DType::float32;
  /// Backward: wanted. Of keys: keys or values.
  bool grad_query = true, grad_keys = true, grad_values = true, grad_additional = true, grad_bias = true;
};

/// Specs in the order of the launches.
class Kernels {
 public:
  static constexpr std::size_t kMost = 8;
  void add(const Spec& spec) { specs_.at(count_++) = spec; }
  [[nodiscard]] std::size_t size() const { return count_; }
  [[nodiscard]] const Spec* begin() const { return specs_.data(); }
  [[nodiscard]] const Spec* end() const { return specs_.data() + count_; }

 private:
  std::array<Spec, kMost> specs_;
  std::size_t count_ = 0;
};

/// Whether rows of whole tensors start at multiples of 16 bytes.
[[nodiscard]] bool can_align(const Problem& problem);

/// Those of one call.
[[nodiscard]] Kernels kernels_of(const Plan& plan, const Call& call);

/// The kernels of all calls that `calls` stands for, each once.
[[nodiscard]] std::vector<Spec> kernels_of(const Plan& plan, const CallSet& calls);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_KERNELS_H_
