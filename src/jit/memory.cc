#include <string>
#include <utility>

#include "jit/device.h"
#include "jit/driver.h"
#include "vicus/device.h"

namespace vicus {
namespace {

using jit::check;
using jit::ContextGuard;
using jit::driver;

jit::CUdeviceptr address(void* data) { return reinterpret_cast<jit::CUdeviceptr>(data); }

}  // namespace

DeviceMemory::DeviceMemory(std::size_t bytes, int device) : bytes_(bytes), device_(device) {
  const ContextGuard context(jit::device(device).ordinal);
  if (bytes == 0) return;
  jit::CUdeviceptr pointer = 0;
  const std::string doing = "taking " + std::to_string(bytes) + " bytes of " + jit::device(device).name;
  check(driver().cuMemAlloc(&pointer, bytes), "cuMemAlloc", doing.c_str());
  data_ = reinterpret_cast<void*>(pointer);  // NOLINT(performance-no-int-to-ptr): the driver's addresses are integers
}

DeviceMemory::~DeviceMemory() {
  if (data_ == nullptr) return;
  const ContextGuard context(device_);
  driver().cuMemFree(address(data_));
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)), device_(other.device_) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

void DeviceMemory::write(const void* from) const {
  if (data_ == nullptr) return;
  const ContextGuard context(device_);
  check(driver().cuMemcpyHtoD(address(data_), from, bytes_), "cuMemcpyHtoD", "copying to the device");
}

void DeviceMemory::read(void* to) const {
  if (data_ == nullptr) return;
  const ContextGuard context(device_);
  check(driver().cuMemcpyDtoH(to, address(data_), bytes_), "cuMemcpyDtoH", "copying from the device");
}

DeviceTimer::DeviceTimer(int device) : device_(device) {
  const ContextGuard context(jit::device(device).ordinal);
  check(driver().cuEventCreate(&start_, 0), "cuEventCreate");
  if (const jit::CUresult failed = driver().cuEventCreate(&stop_, 0); failed != jit::kCudaSuccess) {
    driver().cuEventDestroy(start_);
    check(failed, "cuEventCreate");
  }
}

DeviceTimer::~DeviceTimer() {
  const ContextGuard context(device_);
  driver().cuEventDestroy(start_);
  driver().cuEventDestroy(stop_);
}

void DeviceTimer::start(void* stream) {
  const ContextGuard context(device_);
  check(driver().cuEventRecord(start_, static_cast<jit::CUstream>(stream)), "cuEventRecord");
}

void DeviceTimer::stop(void* stream) {
  const ContextGuard context(device_);
  check(driver().cuEventRecord(stop_, static_cast<jit::CUstream>(stream)), "cuEventRecord");
}

double DeviceTimer::seconds() const {
  const ContextGuard context(device_);
  check(driver().cuEventSynchronize(stop_), "cuEventSynchronize", "waiting for what was timed");
  float milliseconds = 0;
  check(driver().cuEventElapsedTime(&milliseconds, start_, stop_), "cuEventElapsedTime");
  return static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace vicus
