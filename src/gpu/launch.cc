#include "gpu/launch.h"

#include <algorithm>
#include <limits>
#include <span>
#include <string>

#include "jit/device.h"
#include "vicus/error.h"

namespace vicus::gpu {
namespace {

bool aligned(const ConstTensorView& t) {
  if (!t) return true;
  constexpr std::int64_t kBytes = 16;
  const std::int64_t elements = kBytes / static_cast<std::int64_t>(dtype_size(t.dtype()));
  bool all = reinterpret_cast<std::uintptr_t>(t.data()) % kBytes == 0 && t.size(t.dims() - 1) % elements == 0;
  for (int i = 0; i + 1 < t.dims(); ++i) all = all && t.stride(i) % elements == 0;
  return all;
}

}  // namespace

Rows rows_of(const ConstTensorView& t, int rank) {
  Rows rows;
  if (!t) return rows;
  rows.data = const_cast<void*>(t.data());
  rows.batch = t.stride(0);
  rows.head = t.stride(1 + rank);
  for (int i = 0; i < rank; ++i) rows.token[3 - rank + i] = t.stride(1 + i);
  return rows;
}

Bias relative_bias_of(const ConstTensorView& table, int rank) {
  Bias bias;
  if (!table) return bias;
  bias.data = const_cast<void*>(table.data());
  bias.head = table.stride(0);
  for (int i = 0; i < rank; ++i) bias.axis[3 - rank + i] = table.stride(1 + i);
  return bias;
}

bool aligned(std::initializer_list<ConstTensorView> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const ConstTensorView& t) { return aligned(t); });
}

void require_countable(const char* what, std::int64_t n) {
  if (n <= std::numeric_limits<int>::max()) return;
  throw Unsupported(std::string("engine sm80 takes at most 2147483647 ") + what + ", the problem has " +
                    std::to_string(n));
}

jit::KernelCache<Spec>& kernel_cache() {
  static jit::KernelCache<Spec> cache;
  return cache;
}

Loaded::Loaded(const Kernels& kernels, void* stream) : kernels_(kernels), stream_(stream) {
  const std::span<const Spec> specs(kernels_.begin(), kernels_.size());
  const auto find_all = [&] {
    for (std::size_t i = 0; i < specs.size(); ++i) loaded_.at(i) = kernel_cache().find(specs[i]);
    return std::find(loaded_.begin(), loaded_.begin() + specs.size(), nullptr) == loaded_.begin() + specs.size();
  };
  if (find_all()) return;
  jit::refuse_capture(stream);
  kernel_cache().load(specs, source_of);
  find_all();
}

void Loaded::launch(const Spec& spec, Grid grid, const void* args, std::size_t arg_bytes) {
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.x > std::numeric_limits<int>::max() || grid.y > kMostGridY) {
    throw Unsupported("engine sm80 launches at most 2147483647 x 65535 blocks, the problem has " +
                      std::to_string(grid.x) + " x " + std::to_string(grid.y));
  }
  const jit::Kernel& kernel = *loaded_.at(static_cast<std::size_t>(&spec - kernels_.begin()));
  jit::launch(kernel, {.x = static_cast<unsigned>(grid.x), .y = static_cast<unsigned>(grid.y)}, spec.threads(),
              shared_bytes(spec), stream_, args, arg_bytes, launched_ && waits(spec.kernel));
  launched_ = true;
}

Scratch::Scratch(std::size_t bytes, void* stream)
    : stream_(static_cast<jit::CUstream>(stream)), source_(jit::thread_scratch_source()) {
  if (bytes == 0) return;
  if (source_ != nullptr) {
    data_ = reinterpret_cast<jit::CUdeviceptr>(source_->take(bytes, stream_));
    return;
  }
  jit::check(jit::driver().cuMemAllocFromPoolAsync(&data_, bytes, jit::memory_pool(jit::thread_device()), stream_),
             "cuMemAllocFromPoolAsync", "taking scratch");
}

Scratch::~Scratch() {
  if (data_ == 0) return;
  if (source_ != nullptr) source_->give_back(data(), stream_);
  else jit::driver().cuMemFreeAsync(data_, stream_);
}

void Scratch::clear(std::size_t bytes) {
  if (bytes == 0) return;
  jit::check(jit::driver().cuMemsetD8Async(data_, 0, bytes, stream_), "cuMemsetD8Async", "clearing scratch");
}

void Scratch::fill(const void* from, std::size_t bytes) {
  jit::check(jit::driver().cuMemcpyHtoDAsync(data_, from, bytes, stream_), "cuMemcpyHtoDAsync", "copying to scratch");
}

void* Scratch::data() const {
  return reinterpret_cast<void*>(data_);  // NOLINT(performance-no-int-to-ptr): the driver's addresses are integers
}

}  // namespace vicus::gpu
