#include <stdexcept>
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

/// Does what ends an object of `context`. When the driver has ended, as at the exit of a process, and in a child of
/// fork(), nothing is left to be ended.
template <class End>
void in_context(jit::CUcontext context, const End& end) noexcept {
  try {
    const ContextGuard guard(context);
    end();
  } catch (const std::runtime_error&) {
    return;
  }
}

thread_local ScratchSource* scratch_source = nullptr;

}  // namespace

ScratchSource* jit::thread_scratch_source() { return scratch_source; }

ScratchSource::ScratchSource() : before_(std::exchange(scratch_source, this)) {}

ScratchSource::~ScratchSource() { scratch_source = before_; }

DeviceMemory::DeviceMemory(std::size_t bytes, int device) : bytes_(bytes) {
  const ContextGuard guard(jit::device(device).ordinal);
  context_ = jit::thread_context();
  if (bytes == 0) return;
  jit::CUdeviceptr pointer = 0;
  const std::string doing = "taking " + std::to_string(bytes) + " bytes of " + jit::device(device).name;
  check(driver().cuMemAlloc(&pointer, bytes), "cuMemAlloc", doing.c_str());
  data_ = reinterpret_cast<void*>(pointer);  // NOLINT(performance-no-int-to-ptr): the driver's addresses are integers
}

DeviceMemory::~DeviceMemory() {
  if (data_ == nullptr) return;
  in_context(context_, [this] { driver().cuMemFree(address(data_)); });
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)), context_(other.context_) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(context_, other.context_);
  return *this;
}

void DeviceMemory::write(const void* from) const {
  if (data_ == nullptr) return;
  const ContextGuard guard(context_);
  check(driver().cuMemcpyHtoD(address(data_), from, bytes_), "cuMemcpyHtoD", "copying to the device");
}

void DeviceMemory::read(void* to) const {
  if (data_ == nullptr) return;
  const ContextGuard guard(context_);
  check(driver().cuMemcpyDtoH(to, address(data_), bytes_), "cuMemcpyDtoH", "copying from the device");
}

DeviceTimer::DeviceTimer(int device) {
  const ContextGuard guard(jit::device(device).ordinal);
  context_ = jit::thread_context();
  check(driver().cuEventCreate(&start_, 0), "cuEventCreate");
  if (const jit::CUresult failed = driver().cuEventCreate(&stop_, 0); failed != jit::kCudaSuccess) {
    driver().cuEventDestroy(start_);
    check(failed, "cuEventCreate");
  }
}

DeviceTimer::~DeviceTimer() {
  in_context(context_, [this] {
    driver().cuEventDestroy(start_);
    driver().cuEventDestroy(stop_);
  });
}

void DeviceTimer::start(void* stream) {
  const ContextGuard guard(context_);
  check(driver().cuEventRecord(start_, static_cast<jit::CUstream>(stream)), "cuEventRecord");
}

void DeviceTimer::stop(void* stream) {
  const ContextGuard guard(context_);
  check(driver().cuEventRecord(stop_, static_cast<jit::CUstream>(stream)), "cuEventRecord");
}

double DeviceTimer::seconds() const {
  const ContextGuard guard(context_);
  check(driver().cuEventSynchronize(stop_), "cuEventSynchronize", "waiting for what was timed");
  float milliseconds = 0;
  check(driver().cuEventElapsedTime(&milliseconds, start_, stop_), "cuEventElapsedTime");
  return static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace vicus
