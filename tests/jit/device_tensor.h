// Tensors in the memory of the driver that the tests bring along.
#ifndef VICUS_TESTS_JIT_DEVICE_TENSOR_H_
#define VICUS_TESTS_JIT_DEVICE_TENSOR_H_

#include <cstdint>
#include <span>
#include <vector>

#include "jit/device.h"
#include "jit/driver.h"
#include "vicus/tensor.h"

namespace vicus::testing {

/// Memory of a device, aligned as the driver's is.
class Tensor {
 public:
  Tensor(DType dtype, const std::vector<std::int64_t>& shape, std::int64_t offset = 0, int device = 0)
      : device_(device) {
    const jit::ContextGuard context(device);
    const TensorLayout layout{std::span<const std::int64_t>(shape)};
    const std::size_t bytes = (static_cast<std::size_t>(layout.numel() + offset) + 16) * dtype_size(dtype);
    jit::check(jit::driver().cuMemAlloc(&data_, bytes), "cuMemAlloc");
    const std::uintptr_t start = (data_ + 15) / 16 * 16 + static_cast<std::uintptr_t>(offset) * dtype_size(dtype);
    // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are integers
    view = TensorView(reinterpret_cast<void*>(start), dtype, layout);
  }
  ~Tensor() {
    const jit::ContextGuard context(device_);
    jit::driver().cuMemFree(data_);
  }
  Tensor(Tensor&&) = delete;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(Tensor&&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  TensorView view;

 private:
  int device_;
  jit::CUdeviceptr data_ = 0;
};

}  // namespace vicus::testing

#endif  // VICUS_TESTS_JIT_DEVICE_TENSOR_H_
