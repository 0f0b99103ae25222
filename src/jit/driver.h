// The CUDA driver, opened at run time: one binary serves machines with and without a GPU, and needs no CUDA header.
//
// Names and types are the driver's own. The library is libcuda.so.1, or what VICUS_CUDA_DRIVER names.
#ifndef VICUS_JIT_DRIVER_H_
#define VICUS_JIT_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "vicus/device.h"
#include "vicus/error.h"

namespace vicus::jit {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = ::CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = ::CUevent_st*;
using CUmemoryPool = struct CUmemPoolHandle_st*;

inline constexpr CUresult kCudaSuccess = 0, kCudaInvalidValue = 1, kCudaNoDevice = 100, kCudaCaptureImplicit = 906;

enum CUdevice_attribute : int {
  kMultiprocessorCount = 16,
  kL2CacheSize = 38,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerMultiprocessor = 81,
  kMaxSharedMemoryPerBlockOptin = 97,
};
enum CUfunction_attribute : int {
  kStaticSharedBytes = 1,
  kLocalBytes = 3,
  kRegisters = 4,
  kMaxDynamicSharedBytes = 8,
};
enum CUlaunchAttributeID : int { kProgrammaticStreamSerialization = 6 };
struct alignas(8) CUlaunchAttribute {
  CUlaunchAttributeID id = kProgrammaticStreamSerialization;
  int padding = 0;
  int value[16] = {};
};
struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned attribute_count;
};
enum CUtensorMapDataType : int { kTensorMapFloat16 = 6, kTensorMapFloat32 = 7, kTensorMapBfloat16 = 9 };
enum CUtensorMapInterleave : int { kTensorMapNotInterleaved = 0 };
enum CUtensorMapSwizzle : int { kTensorMapNotSwizzled = 0, kTensorMapSwizzle128 = 3 };
enum CUtensorMapL2promotion : int { kTensorMapPromote256 = 3 };
enum CUtensorMapFloatOOBfill : int { kTensorMapZeros = 0 };
enum CUpointer_attribute : int { kPointerDeviceOrdinal = 9 };
enum CUmemPool_attribute : int { kPoolReleaseThreshold = 4 };
enum CUmemAllocationType : int { kPinnedMemory = 1 };
enum CUmemLocationType : int { kDeviceMemory = 1 };
enum CUstreamCaptureStatus : int { kNotCapturing = 0 };
enum CUstreamCaptureMode : int { kCaptureModeRelaxed = 2 };

/// Of memory on device `id`; the rest stays zero.
struct CUmemPoolProps {
  CUmemAllocationType type = kPinnedMemory;
  int handles = 0;
  CUmemLocationType location = kDeviceMemory;
  CUdevice id = 0;
  std::uint64_t rest[9] = {};
};

/// The entry points in use. All are there, but for those marked optional, which may be null.
struct Driver {
  std::string path;
  int version = 0;  // 13000: 13.0

  CUresult (*cuInit)(unsigned flags);
  CUresult (*cuDriverGetVersion)(int* version);
  CUresult (*cuGetErrorName)(CUresult, const char** name);
  CUresult (*cuGetErrorString)(CUresult, const char** text);
  CUresult (*cuDeviceGetCount)(int* count);
  CUresult (*cuDeviceGetName)(char* name, int bytes, CUdevice);
  CUresult (*cuDeviceGetAttribute)(int* value, CUdevice_attribute, CUdevice);
  CUresult (*cuDevicePrimaryCtxRetain)(CUcontext*, CUdevice);
  CUresult (*cuCtxGetCurrent)(CUcontext*);
  CUresult (*cuCtxGetDevice)(CUdevice*);
  CUresult (*cuCtxGetId)(CUcontext, unsigned long long* id);  // optional: since 12.0
  CUresult (*cuCtxPushCurrent)(CUcontext);
  CUresult (*cuCtxPopCurrent)(CUcontext*);
  CUresult (*cuModuleLoadData)(CUmodule*, const void* image);
  CUresult (*cuModuleGetFunction)(CUfunction*, CUmodule, const char* name);
  CUresult (*cuFuncGetAttribute)(int* value, CUfunction_attribute, CUfunction);
  CUresult (*cuFuncSetAttribute)(CUfunction, CUfunction_attribute, int value);
  CUresult (*cuFuncGetParamInfo)(CUfunction, std::size_t index, std::size_t* offset,
                                 std::size_t* bytes);  // optional: since 12.4
  CUresult (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, CUfunction, int threads, std::size_t shared);
  CUresult (*cuLaunchKernel)(CUfunction, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared, CUstream, void** params,
                             void** extra);
  CUresult (*cuLaunchKernelEx)(const CUlaunchConfig*, CUfunction, void** params, void** extra);  // optional: since 11.8
  CUresult (*cuTensorMapEncodeTiled)(void* map, CUtensorMapDataType, std::uint32_t rank, void* data,
                                     const std::uint64_t* sizes, const std::uint64_t* strides, const std::uint32_t* box,
                                     const std::uint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion,
                                     CUtensorMapFloatOOBfill);  // optional: since 12.0
  CUresult (*cuStreamIsCapturing)(CUstream, CUstreamCaptureStatus*);
  CUresult (*cuThreadExchangeStreamCaptureMode)(CUstreamCaptureMode*);
  CUresult (*cuMemAlloc)(CUdeviceptr*, std::size_t bytes);
  CUresult (*cuMemFree)(CUdeviceptr);
  CUresult (*cuMemcpyHtoD)(CUdeviceptr to, const void* from, std::size_t bytes);
  CUresult (*cuMemcpyDtoH)(void* to, CUdeviceptr from, std::size_t bytes);
  CUresult (*cuEventCreate)(CUevent*, unsigned flags);
  CUresult (*cuEventDestroy)(CUevent);
  CUresult (*cuEventRecord)(CUevent, CUstream);
  CUresult (*cuEventSynchronize)(CUevent);
  CUresult (*cuEventElapsedTime)(float* milliseconds, CUevent start, CUevent stop);
  CUresult (*cuMemPoolCreate)(CUmemoryPool*, const CUmemPoolProps*);
  CUresult (*cuMemPoolSetAttribute)(CUmemoryPool, CUmemPool_attribute, void* value);
  CUresult (*cuMemAllocFromPoolAsync)(CUdeviceptr*, std::size_t bytes, CUmemoryPool, CUstream);
  CUresult (*cuMemFreeAsync)(CUdeviceptr, CUstream);
  CUresult (*cuMemcpyHtoDAsync)(CUdeviceptr, const void* from, std::size_t bytes, CUstream);
  CUresult (*cuMemsetD8Async)(CUdeviceptr, unsigned char value, std::size_t bytes, CUstream);
  CUresult (*cuPointerGetAttribute)(void* value, CUpointer_attribute, CUdeviceptr);
};

/// The driver, opened and initialised by the first call. Throws Unsupported where there is none or no device, DriverError
/// where it does not start, and in a child of fork() whose parent had started it: CUDA does not survive a fork.
[[nodiscard]] const Driver& driver();

/// Throws DriverError unless `result` is success. `doing` is put into the text: "loading forward.cu for sm_90".
[[noreturn]] void throw_driver_error(CUresult result, const char* call, const std::string& doing);
inline void check(CUresult result, const char* call, const char* doing = "") {
  if (result != kCudaSuccess) [[unlikely]]
    throw_driver_error(result, call, doing);
}

}  // namespace vicus::jit

#endif  // VICUS_JIT_DRIVER_H_
