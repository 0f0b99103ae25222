// From views to what kernels are called with, and the way to the driver. Tensors are device memory; every kernel is
// compiled, or found, and queued on the caller's stream.
#ifndef VICUS_GPU_LAUNCH_H_
#define VICUS_GPU_LAUNCH_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "gpu/args.h"
#include "gpu/kernels.h"
#include "gpu/spec.h"
#include "jit/driver.h"
#include "jit/module.h"
#include "vicus/device.h"
#include "vicus/tensor.h"

namespace vicus::gpu {

/// A heads-last tensor [B, *X, H, ...] of `rank` token axes, which trail in three. An absent view has no data.
[[nodiscard]] Rows rows_of(const ConstTensorView& tensor, int rank);
/// A relative positional bias [H, 2 w0 - 1, ...], or its gradient.
[[nodiscard]] Bias relative_bias_of(const ConstTensorView& table, int rank);
/// Whether rows of all tensors start at multiples of 16 bytes and have a multiple of 16 bytes; absent ones do.
[[nodiscard]] bool aligned(std::initializer_list<ConstTensorView> tensors);

/// Blocks along x and y.
struct Grid {
  Grid(std::int64_t along_x, std::int64_t along_y = 1)  // NOLINT(google-explicit-constructor): most have one axis
      : x(along_x), y(along_y) {}
  std::int64_t x, y;
};
/// The most blocks along y; kernels whose y may exceed it take several steps.
inline constexpr std::int64_t kMostGridY = 65535;

/// Throws Unsupported, naming `what`, unless kernels can count `n` in an int.
void require_countable(const char* what, std::int64_t n);

/// All kernels that were loaded.
[[nodiscard]] jit::KernelCache<Spec>& kernel_cache();

/// The kernels of a call, loaded: all of them before the first is launched, so that what cannot be compiled or may not be
/// compiled now (a stream under capture) fails before anything is written.
class Loaded {
 public:
  Loaded(const Kernels& kernels, void* stream);

  [[nodiscard]] const Kernels& specs() const { return kernels_; }
  /// Whether one that waits is launched after this one.
  [[nodiscard]] bool followed(const Spec& spec) const {
    return &spec + 1 != kernels_.end() && waits((&spec + 1)->kernel);
  }

  /// `spec` is one of `specs()`; one that waits (spec.h) may begin before the one launched last by this ends. An empty grid is
  /// nothing to do. Throws Unsupported beyond the driver's largest grid.
  template <class Args>
  void launch(const Spec& spec, Grid grid, const Args& args) {
    launch(spec, grid, &args, sizeof(args));
  }

 private:
  void launch(const Spec& spec, Grid grid, const void* args, std::size_t arg_bytes);

  Kernels kernels_;
  std::array<const jit::Kernel*, Kernels::kMost> loaded_{};
  void* stream_;
  bool launched_ = false;
};

/// Memory of the stream's device, given back in the order of the stream: of the thread's ScratchSource, or of the library's
/// pool.
class Scratch {
 public:
  Scratch(std::size_t bytes, void* stream);
  ~Scratch();
  Scratch(Scratch&&) = delete;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(Scratch&&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void clear(std::size_t bytes);
  /// From memory of the host, which may change as soon as this returns.
  void fill(const void* from, std::size_t bytes);
  [[nodiscard]] void* data() const;

 private:
  jit::CUstream stream_;
  ScratchSource* source_;
  jit::CUdeviceptr data_ = 0;
};

}  // namespace vicus::gpu

#endif  // VICUS_GPU_LAUNCH_H_
