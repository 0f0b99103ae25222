// Memory and clocks of NVIDIA GPUs, for programs that use engine sm80 without a CUDA toolkit. A program that has its own
// device memory and streams does not need this.
//
// Every constructor throws Unsupported where there is no driver or GPU, InvalidArgument for a device that is not there, and
// DriverError where the driver refuses. Objects live in the context that is the thread's where they are made, if that is of
// their device, else in the primary context, the one of the CUDA runtime; they may be used and end
// anywhere, but before that context does.
#ifndef VICUS_DEVICE_H_
#define VICUS_DEVICE_H_

#include <cstddef>

#include "vicus/export.h"

struct CUctx_st;  // the driver's
struct CUevent_st;

namespace vicus {

/// A block of device memory that frees itself.
class VICUS_API DeviceMemory {
 public:
  DeviceMemory() = default;
  /// Its contents are not set. No memory is taken for 0 bytes.
  explicit DeviceMemory(std::size_t bytes, int device = 0);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  /// An address of the device, for tensor views.
  [[nodiscard]] void* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

  /// Copies all of it from, or to, memory of the host. Waits for what the default stream was given before.
  void write(const void* from) const;
  void read(void* to) const;

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  CUctx_st* context_ = nullptr;
};

/// Time between two places in a stream, by the clock of the device.
class VICUS_API DeviceTimer {
 public:
  explicit DeviceTimer(int device = 0);
  ~DeviceTimer();
  DeviceTimer(DeviceTimer&&) = delete;
  DeviceTimer(const DeviceTimer&) = delete;
  DeviceTimer& operator=(DeviceTimer&&) = delete;
  DeviceTimer& operator=(const DeviceTimer&) = delete;

  /// Queues the two places on a stream (a cudaStream_t or CUstream).
  void start(void* stream = nullptr);
  void stop(void* stream = nullptr);
  /// Waits until the second is reached.
  [[nodiscard]] double seconds() const;

 private:
  CUctx_st* context_ = nullptr;
  CUevent_st *start_ = nullptr, *stop_ = nullptr;
};

/// Where calls on GPUs take scratch memory from, in place of a pool of the library's own on each device, which keeps up to
/// 1 GiB. It holds for the thread that makes it, as long as it lives; then the one before it does again. That thread
/// ends it, the last made first.
///
/// PyTorch's front end has one over PyTorch's allocator, so that scratch shares memory with tensors.
class VICUS_API ScratchSource {
 public:
  ScratchSource();
  virtual ~ScratchSource();
  ScratchSource(ScratchSource&&) = delete;
  ScratchSource(const ScratchSource&) = delete;
  ScratchSource& operator=(ScratchSource&&) = delete;
  ScratchSource& operator=(const ScratchSource&) = delete;

  /// `bytes`, more than 0, of the device of the call, at a multiple of 256, for work that `stream` is about to be given.
  /// What it throws ends the call before anything is launched.
  virtual void* take(std::size_t bytes, void* stream) = 0;
  /// All work on it has been queued on `stream`, and may not have begun.
  virtual void give_back(void* data, void* stream) noexcept = 0;

 private:
  ScratchSource* before_;
};

}  // namespace vicus

#endif  // VICUS_DEVICE_H_
