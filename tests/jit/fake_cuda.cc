// A libcuda without a GPU: the entry points that src/jit uses, and a record of the calls.
#include "fake_cuda.h"

#include <cstdlib>
#include <cstring>
#include <deque>

using vicus::testing::FakeContext;
using vicus::testing::FakeCuda;

namespace {

struct Module {
  std::string image;
};
struct Function {
  std::string name;
};

FakeCuda state;
std::deque<Module> modules;
std::deque<Function> functions;
thread_local std::vector<FakeContext*> stack;
thread_local int capture_mode = 0;

/// The code with which `call` shall fail, or 0. The environment's word, "cuInit 100", is for other processes.
int failing(const char* call) {
  if (const char* const asked = std::getenv("FAKE_CUDA_FAILS"); asked != nullptr) {
    const std::string text = asked;
    const std::size_t space = text.find(' ');
    if (text.substr(0, space) == call) return std::atoi(text.c_str() + space);
  }
  const std::lock_guard lock(state.mutex);
  return state.failing_call == call ? state.failing_code : 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int

EXPORT cuInit(unsigned) { return failing("cuInit"); }
EXPORT cuDriverGetVersion(int* version) {
  *version = 13010;
  return 0;
}
EXPORT cuGetErrorName(int code, const char** name) {
  *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_FAKE";
  return 0;
}
EXPORT cuGetErrorString(int, const char** text) {
  *text = "what the driver says";
  return 0;
}
EXPORT cuDeviceGetCount(int* count) {
  *count = FakeCuda::kDevices;
  return failing("cuDeviceGetCount");
}
EXPORT cuDeviceGetName(char* name, int bytes, int device) {
  std::strncpy(name, device == 0 ? "Fake A" : "Fake B", static_cast<std::size_t>(bytes));
  return 0;
}
EXPORT cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16:
      *value = 108 + device;
      return 0;
    case 38:
      *value = 40 << 20;
      return 0;
    case 75:
      *value = 8 + device;
      return 0;
    case 76:
      *value = 0;
      return 0;
    case 81:
      *value = FakeCuda::kSharedBytes + 1024;
      return 0;
    case 97:
      *value = FakeCuda::kSharedBytes;
      return 0;
    default:
      return 1;
  }
}
EXPORT cuDevicePrimaryCtxRetain(FakeContext** context, int device) {
  if (const int code = failing("cuDevicePrimaryCtxRetain")) return code;
  ++state.retained;
  *context = &state.primary.at(static_cast<std::size_t>(device));
  return 0;
}
EXPORT cuCtxGetCurrent(FakeContext** context) {
  *context = stack.empty() ? nullptr : stack.back();
  return failing("cuCtxGetCurrent");
}
EXPORT cuCtxGetDevice(int* device) {
  if (stack.empty()) return 201;
  *device = stack.back()->device;
  return 0;
}
EXPORT cuCtxGetId(FakeContext* context, unsigned long long* id) {
  *id = context->id;
  return 0;
}
EXPORT cuCtxPushCurrent_v2(FakeContext* context) {
  stack.push_back(context);
  return 0;
}
EXPORT cuCtxPopCurrent_v2(FakeContext** context) {
  if (stack.empty()) return 201;
  *context = stack.back();
  stack.pop_back();
  return 0;
}
EXPORT cuModuleLoadData(Module** module, const void* image) {
  if (const int code = failing("cuModuleLoadData")) return code;
  const std::lock_guard lock(state.mutex);
  ++state.loads;
  state.relaxed_loads += capture_mode == 2;
  *module = &modules.emplace_back(Module{static_cast<const char*>(image)});
  return 0;
}
EXPORT cuModuleGetFunction(Function** function, Module* module, const char* name) {
  const std::lock_guard lock(state.mutex);
  if (module->image.find(name) == std::string::npos) return 500;
  *function = &functions.emplace_back(Function{name});
  return 0;
}
EXPORT cuFuncGetAttribute(int* value, int attribute, Function*) {
  *value = attribute == 1 ? 100 : attribute == 3 ? 16 : 40;
  return failing("cuFuncGetAttribute");
}
EXPORT cuFuncSetAttribute(Function*, int attribute, int value) {
  ++state.attribute_sets;
  if (attribute == 8) state.dynamic_shared_bytes = value;
  return 0;
}
EXPORT cuFuncGetParamInfo(Function*, std::size_t index, std::size_t* offset, std::size_t* bytes) {
  *offset = 0;
  *bytes = FakeCuda::kArgBytes;
  return index == 0 ? 0 : 1;
}
EXPORT cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int threads, std::size_t shared) {
  *blocks = 2048 / threads - static_cast<int>(shared / 50000);
  return 0;
}
EXPORT cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void* stream, void** params, void** extra) {
  if (const int code = failing("cuLaunchKernel")) return code;
  if (by != 1 || bz != 1 || extra != nullptr) return 1;
  const std::lock_guard lock(state.mutex);
  state.launches.push_back({function->name,
                            {gx, gy, gz},
                            bx,
                            shared,
                            stream,
                            std::string(static_cast<const char*>(params[0]), FakeCuda::kArgBytes)});
  return 0;
}
EXPORT cuStreamIsCapturing(void*, int* status) {
  *status = state.capture_status;
  return failing("cuStreamIsCapturing");
}
EXPORT cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}
// Memory has no stand-in: the symbols are there, as the driver is refused without them.
EXPORT cuMemAllocAsync(unsigned long long*, std::size_t, void*) { return 801; }
EXPORT cuMemFreeAsync(unsigned long long, void*) { return 801; }
EXPORT cuMemsetD8Async(unsigned long long, unsigned char, std::size_t, void*) { return 801; }
EXPORT cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  if (attribute != 9 || pointer >= FakeCuda::kDevices) return 1;  // "device memory": addresses 0 and 1
  *static_cast<int*>(value) = static_cast<int>(pointer);
  return 0;
}

extern "C" __attribute__((visibility("default"))) FakeCuda* fake_cuda_state() { return &state; }
