#include "jit/driver.h"

#include <pthread.h>

#include <atomic>
#include <exception>

#include "jit/library.h"

namespace vicus::jit {
namespace {

/// Set in a child of fork(). A handler costs nothing per call; asking for the process id would be a system call.
std::atomic<bool> forked{false};

[[nodiscard]] std::string describe(const Driver& driver, CUresult result) {
  const char *name = nullptr, *text = nullptr;
  if (driver.cuGetErrorName(result, &name) != kCudaSuccess || name == nullptr) name = "unknown error";
  if (driver.cuGetErrorString(result, &text) != kCudaSuccess || text == nullptr) text = "no description";
  return std::string(name) + " (" + std::to_string(result) + "), " + text;
}

Driver open_driver() {
  std::string error, name = environment("VICUS_CUDA_DRIVER");
  if (name.empty()) name = "libcuda.so.1";
  const Library library = Library::open(name, &error);
  if (!library) throw Unsupported("there is no CUDA driver here: " + error);
  Driver d;
  d.path = library.path_of("cuInit");
  const auto need = [&](auto*& function, const char* symbol) {
    if (library.resolve(function, symbol)) return;
    throw Unsupported("the CUDA driver " + name + " has no " + symbol + "; a driver for CUDA 11.2 or later is needed");
  };
  need(d.cuInit, "cuInit");
  need(d.cuDriverGetVersion, "cuDriverGetVersion");
  need(d.cuGetErrorName, "cuGetErrorName");
  need(d.cuGetErrorString, "cuGetErrorString");
  need(d.cuDeviceGetCount, "cuDeviceGetCount");
  need(d.cuDeviceGetName, "cuDeviceGetName");
  need(d.cuDeviceGetAttribute, "cuDeviceGetAttribute");
  need(d.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  need(d.cuCtxGetCurrent, "cuCtxGetCurrent");
  need(d.cuCtxGetDevice, "cuCtxGetDevice");
  library.resolve(d.cuCtxGetId, "cuCtxGetId");
  need(d.cuCtxPushCurrent, "cuCtxPushCurrent_v2");
  need(d.cuCtxPopCurrent, "cuCtxPopCurrent_v2");
  need(d.cuModuleLoadData, "cuModuleLoadData");
  need(d.cuModuleGetFunction, "cuModuleGetFunction");
  need(d.cuFuncGetAttribute, "cuFuncGetAttribute");
  need(d.cuFuncSetAttribute, "cuFuncSetAttribute");
  library.resolve(d.cuFuncGetParamInfo, "cuFuncGetParamInfo");
  need(d.cuOccupancyMaxActiveBlocksPerMultiprocessor, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  need(d.cuLaunchKernel, "cuLaunchKernel");
  library.resolve(d.cuLaunchKernelEx, "cuLaunchKernelEx");
  library.resolve(d.cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled");
  need(d.cuStreamIsCapturing, "cuStreamIsCapturing");
  need(d.cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode");
  need(d.cuMemAlloc, "cuMemAlloc_v2");
  need(d.cuMemFree, "cuMemFree_v2");
  need(d.cuMemcpyHtoD, "cuMemcpyHtoD_v2");
  need(d.cuMemcpyDtoH, "cuMemcpyDtoH_v2");
  need(d.cuEventCreate, "cuEventCreate");
  need(d.cuEventDestroy, "cuEventDestroy_v2");
  need(d.cuEventRecord, "cuEventRecord");
  need(d.cuEventSynchronize, "cuEventSynchronize");
  need(d.cuEventElapsedTime, "cuEventElapsedTime");
  need(d.cuMemPoolCreate, "cuMemPoolCreate");
  need(d.cuMemPoolSetAttribute, "cuMemPoolSetAttribute");
  need(d.cuMemAllocFromPoolAsync, "cuMemAllocFromPoolAsync");
  need(d.cuMemFreeAsync, "cuMemFreeAsync");
  need(d.cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
  need(d.cuMemsetD8Async, "cuMemsetD8Async");
  need(d.cuPointerGetAttribute, "cuPointerGetAttribute");

  ::pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  const CUresult started = d.cuInit(0);
  if (started == kCudaNoDevice) throw Unsupported("the CUDA driver " + d.path + " finds no device");
  if (started != kCudaSuccess) throw DriverError("cuInit", started, describe(d, started));
  if (d.cuDriverGetVersion(&d.version) != kCudaSuccess) d.version = 0;
  return d;
}

/// What the first call came to; later calls repeat it without another try.
struct Opened {
  Driver driver{};
  std::exception_ptr failure;
  Opened() noexcept {
    try {
      driver = open_driver();
    } catch (...) {
      failure = std::current_exception();
    }
  }
};

const Opened& opened() {
  static const Opened once;
  return once;
}

}  // namespace

const Driver& driver() {
  const Opened& once = opened();
  if (once.failure) [[unlikely]]
    std::rethrow_exception(once.failure);
  if (forked.load(std::memory_order_relaxed)) [[unlikely]] {
    throw Unsupported(
        "this process was forked from one that had started CUDA, which does not survive a fork; start processes with "
        "spawn or forkserver, or use the GPU only after the fork");
  }
  return once.driver;
}

void throw_driver_error(CUresult result, const char* call, const std::string& doing) {
  throw DriverError(call, result, describe(opened().driver, result) + (doing.empty() ? "" : "; while " + doing));
}

}  // namespace vicus::jit
