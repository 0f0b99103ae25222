#include "jit/module.h"

#include <stdexcept>

#include "vicus/error.h"

namespace vicus::jit {

Kernel load_kernel(const Source& source) {
  const Driver& d = driver();
  const Device& device = current_device();
  CompileReport report;
  const std::string code = cubin(source, device.arch, &report);
  const std::string doing = "loading " + name_of(source) + " on device " + std::to_string(device.ordinal) + " (" +
                            device.name + ", " + name_of(device.arch) + ", driver for CUDA " +
                            std::to_string(d.version / 1000) + "." + std::to_string(d.version % 1000 / 10) + ")";
  const RelaxedCapture relaxed;
  Kernel kernel{.name = report.kernel + " of " + name_of(source)};
  CUmodule module = nullptr;
  check(d.cuModuleLoadData(&module, code.data()), "cuModuleLoadData", doing.c_str());
  check(d.cuModuleGetFunction(&kernel.function, module, report.kernel.c_str()), "cuModuleGetFunction", doing.c_str());
  const auto attribute = [&](CUfunction_attribute which) {
    int value = 0;
    check(d.cuFuncGetAttribute(&value, which, kernel.function), "cuFuncGetAttribute", doing.c_str());
    return value;
  };
  kernel.registers = attribute(kRegisters);
  kernel.local_bytes = attribute(kLocalBytes);
  kernel.shared_bytes = attribute(kStaticSharedBytes);
  check(d.cuFuncSetAttribute(kernel.function, kMaxDynamicSharedBytes,
                             device.shared_bytes_per_block - kernel.shared_bytes),
        "cuFuncSetAttribute", doing.c_str());
  // Before 12.3 graphs that are captured do not know of it.
  constexpr int kFirstArch = 9, kFirstDriver = 12030;
  kernel.can_overlap = d.cuLaunchKernelEx != nullptr && device.arch.major >= kFirstArch && d.version >= kFirstDriver;
  std::size_t offset = 0;
  if (d.cuFuncGetParamInfo != nullptr) {
    check(d.cuFuncGetParamInfo(kernel.function, 0, &offset, &kernel.arg_bytes), "cuFuncGetParamInfo", doing.c_str());
  }
  return kernel;
}

bool capturing(void* stream) {
  CUstreamCaptureStatus status = kNotCapturing;
  const CUresult result = driver().cuStreamIsCapturing(static_cast<CUstream>(stream), &status);
  // The legacy default stream cannot even be asked while another stream is captured.
  if (result == kCudaCaptureImplicit) return true;
  check(result, "cuStreamIsCapturing");
  return status != kNotCapturing;
}

void refuse_capture(void* stream) {
  if (!capturing(stream)) return;
  throw Unsupported(
      "a GPU kernel must be compiled and loaded, and the stream is being captured into a CUDA graph; before the "
      "capture "
      "begins, call vicus::prepare (C++) or vicus.warmup (Python) for the same call, or make the call once");
}

void launch(const Kernel& kernel, Dim3 grid, int threads, int dynamic_shared_bytes, void* stream, const void* args,
            std::size_t arg_bytes, bool overlap) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (kernel.arg_bytes != 0 && kernel.arg_bytes != arg_bytes) [[unlikely]] {
    throw std::logic_error(kernel.name + " takes " + std::to_string(kernel.arg_bytes) + " bytes of arguments; got " +
                           std::to_string(arg_bytes));
  }
  void* params[] = {const_cast<void*>(args)};
  const bool overlaps = overlap && kernel.can_overlap;
  const auto block = static_cast<unsigned>(threads), shared = static_cast<unsigned>(dynamic_shared_bytes);
  CUresult result = kCudaSuccess;
  if (overlaps) {
    CUlaunchAttribute serialization{.value = {1}};
    const CUlaunchConfig config{grid.x,         grid.y, grid.z, block, 1, 1, shared, static_cast<CUstream>(stream),
                                &serialization, 1};
    result = driver().cuLaunchKernelEx(&config, kernel.function, params, nullptr);
  } else {
    result = driver().cuLaunchKernel(kernel.function, grid.x, grid.y, grid.z, block, 1, 1, shared,
                                     static_cast<CUstream>(stream), params, nullptr);
  }
  if (result == kCudaSuccess) [[likely]]
    return;
  throw_driver_error(result, overlaps ? "cuLaunchKernelEx" : "cuLaunchKernel",
                     "launching " + kernel.name + " with grid " + std::to_string(grid.x) + " x " +
                         std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " + std::to_string(threads) +
                         " threads (" + std::to_string(kernel.registers) + " registers each), " +
                         std::to_string(dynamic_shared_bytes) + " + " + std::to_string(kernel.shared_bytes) +
                         " bytes of shared memory");
}

int blocks_per_multiprocessor(const Kernel& kernel, int threads, int dynamic_shared_bytes) {
  int blocks = 0;
  check(driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, threads,
                                                             static_cast<std::size_t>(dynamic_shared_bytes)),
        "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

}  // namespace vicus::jit
