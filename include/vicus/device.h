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

}  // namespace vicus

#endif  // VICUS_DEVICE_H_
