// CUDA devices and the context that calls run in.
#ifndef VICUS_JIT_DEVICE_H_
#define VICUS_JIT_DEVICE_H_

#include <cstdint>
#include <string>

#include "jit/compile.h"
#include "jit/driver.h"
#include "vicus/device.h"
#include "vicus/plan.h"

namespace vicus::jit {

struct Device {
  int ordinal = 0;
  std::string name;
  Arch arch;
  int multiprocessors = 0;
  int shared_bytes_per_block = 0, shared_bytes_per_multiprocessor = 0;  // the most a kernel may ask for
  int l2_bytes = 0;
};

/// What a plan needs to know of it.
[[nodiscard]] inline GpuTarget target_of(const Device& device) {
  return {.major = device.arch.major,
          .minor = device.arch.minor,
          .multiprocessors = device.multiprocessors,
          .shared_bytes_per_block = device.shared_bytes_per_block};
}

[[nodiscard]] int device_count();

/// Looked up once, then a reference to the same object. Throws InvalidArgument unless 0 <= ordinal < device_count().
[[nodiscard]] const Device& device(int ordinal);

/// The device whose memory `pointer` is, or -1 for memory of the host.
[[nodiscard]] int device_of(const void* pointer);

/// Scratch memory of a device, in the order of streams. Between calls it keeps up to 1 GiB of what calls have used: to map
/// memory anew after each synchronization takes longer than many kernels.
[[nodiscard]] CUmemoryPool memory_pool(int ordinal);

/// What gives this thread's calls scratch memory instead, or null.
[[nodiscard]] ScratchSource* thread_scratch_source();

/// The device of this thread's context. Throws Unsupported when it has none (see ContextGuard).
[[nodiscard]] const Device& current_device();

/// The same as a number, 0 for a thread without a context.
[[nodiscard]] int thread_device();

/// The context of this thread, null where it has none.
[[nodiscard]] CUcontext thread_context();

/// A number that no two contexts of this process share, also not one after another.
[[nodiscard]] std::uint64_t current_context();

/// For its life, this thread has a context of device `ordinal`: the one it has, if it is of that device, else the
/// device's primary context, which PyTorch and the CUDA runtime use. Or it has the context given.
class ContextGuard {
 public:
  explicit ContextGuard(int ordinal);
  explicit ContextGuard(CUcontext context);
  ~ContextGuard();
  ContextGuard(ContextGuard&&) = delete;
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(ContextGuard&&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  bool pushed_ = false;
};

/// While another thread captures a graph, the driver refuses what might disturb it, unless a thread says that it knows
/// what it does. Loading code and making a pool of memory concern no stream.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(RelaxedCapture&&) = delete;
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(RelaxedCapture&&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { check(driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode"); }
  CUstreamCaptureMode mode_ = kCaptureModeRelaxed;
};

}  // namespace vicus::jit

#endif  // VICUS_JIT_DEVICE_H_
