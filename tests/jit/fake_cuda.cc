// A libcuda without a GPU: the entry points that src/jit uses, and a record of the calls.
#include "fake_cuda.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "box_map.h"
#include "machine.h"

using vicus::testing::FakeContext;
using vicus::testing::FakeCuda;
using vicus::testing::FakeLaunch;
using vicus::testing::FakePool;

namespace {

struct Module {
  std::string image;
  void* host_code = nullptr;  // of images that are for this machine
};
struct Function {
  std::string name;
  emulation::Kernel kernel = nullptr;  // of modules with host code
  std::size_t arg_bytes = 0;
};
struct Event {};
struct LaunchAttribute {
  int id, padding, value[16];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

FakeCuda state;
std::deque<Module> modules;
std::deque<Function> functions;
thread_local std::vector<FakeContext*> stack;
thread_local int capture_mode = 0;
constexpr int kEmulationFailed = 719;   // CUDA_ERROR_LAUNCH_FAILED
const char* emulation_error = nullptr;  // of the last kernel that ran

/// Needs the lock.
void note(const std::string& event) {
  state.events.push_back(event);
  if (const char* const file = std::getenv("FAKE_CUDA_LOG"); file != nullptr) {
    std::ofstream(file, std::ios::app) << event << std::endl;
  }
}

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

int shared_bytes(int device) {
  const char* const asked = std::getenv("FAKE_CUDA_SHARED_BYTES");
  if (asked == nullptr) return FakeCuda::kSharedBytes;
  const std::string text = asked;
  return std::atoi(text.c_str() + (device == 0 ? 0 : text.find(' ')));
}

int multiprocessors(int device) {
  const char* const asked = std::getenv("FAKE_CUDA_MULTIPROCESSORS");
  return asked == nullptr ? 108 + device : std::atoi(asked);
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
EXPORT cuGetErrorString(int code, const char** text) {
  *text = code == kEmulationFailed ? emulation_error : "what the driver says";
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
      *value = multiprocessors(device);
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
      *value = shared_bytes(device) + 1024;
      return 0;
    case 97:
      *value = shared_bytes(device);
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
  if (const int code = failing("cuCtxPushCurrent_v2")) return code;
  stack.push_back(context);
  return 0;
}
EXPORT cuCtxPopCurrent_v2(FakeContext** context) {
  if (stack.empty()) return 201;
  *context = stack.back();
  stack.pop_back();
  return 0;
}
namespace {

bool is_elf(const char* image) {
  return std::strncmp(image,
                      "\x7f"
                      "ELF",
                      4) == 0;
}

/// A text, or an ELF file, which ends with its section headers.
std::string image_at(const char* image) {
  if (!is_elf(image)) return image;
  std::uint64_t sections = 0;
  std::uint16_t size = 0, count = 0;
  std::memcpy(&sections, image + 40, sizeof(sections));
  std::memcpy(&size, image + 58, sizeof(size));
  std::memcpy(&count, image + 60, sizeof(count));
  return {image, sections + std::uint64_t{size} * count};
}

/// The shared object in an image, or nothing where it is no such object.
void* host_code_of(const std::string& image) {
  constexpr char kCudaMachine = static_cast<char>(190);
  if (!is_elf(image.c_str()) || image.at(18) == kCudaMachine) return nullptr;
  std::string name = (std::filesystem::temp_directory_path() / "vicus-kernel-XXXXXX").string();
  const int file = ::mkstemp(name.data());
  if (file < 0) return nullptr;
  ::close(file);
  std::ofstream(name, std::ios::binary) << image;
  void* const code = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  ::unlink(name.c_str());
  return code;
}

}  // namespace

EXPORT cuModuleLoadData(Module** module, const void* image) {
  if (const int code = failing("cuModuleLoadData")) return code;
  const std::lock_guard lock(state.mutex);
  ++state.loads;
  state.relaxed_loads += capture_mode == 2;
  Module& made = modules.emplace_back(Module{image_at(static_cast<const char*>(image))});
  made.host_code = host_code_of(made.image);
  *module = &made;
  return 0;
}
EXPORT cuModuleGetFunction(Function** function, Module* module, const char* name) {
  const std::lock_guard lock(state.mutex);
  if (module->image.find(name) == std::string::npos) return 500;
  Function& made = functions.emplace_back(Function{name});
  *function = &made;
  if (module->host_code == nullptr) return 0;
  const std::string symbol = "emulated_" + made.name;
  made.kernel = reinterpret_cast<emulation::Kernel>(::dlsym(module->host_code, symbol.c_str()));
  auto* const bytes = reinterpret_cast<std::size_t (*)()>(::dlsym(module->host_code, (symbol + "_bytes").c_str()));
  if (made.kernel == nullptr || bytes == nullptr) return 500;
  made.arg_bytes = bytes();
  return 0;
}
EXPORT cuFuncGetAttribute(int* value, int attribute, Function* function) {
  *value = attribute == 1 ? (function->kernel == nullptr ? 100 : 0) : attribute == 3 ? 16 : 40;
  return failing("cuFuncGetAttribute");
}
EXPORT cuFuncSetAttribute(Function*, int attribute, int value) {
  ++state.attribute_sets;
  if (attribute == 8) state.dynamic_shared_bytes = value;
  return 0;
}
EXPORT cuFuncGetParamInfo(Function* function, std::size_t index, std::size_t* offset, std::size_t* bytes) {
  *offset = 0;
  const std::lock_guard lock(state.mutex);
  *bytes = state.arg_bytes.contains(function->name) ? state.arg_bytes[function->name] : function->arg_bytes;
  return index == 0 ? 0 : 1;
}
EXPORT cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int threads, std::size_t shared) {
  *blocks = 2048 / threads - static_cast<int>(shared / 50000);
  return 0;
}

namespace {

int launch(Function* function, const LaunchConfig& config, void** params, void** extra) {
  if (config.block[1] != 1 || config.block[2] != 1 || extra != nullptr) return 1;
  const std::lock_guard lock(state.mutex);
  const unsigned threads = config.block[0];
  note("launch " + function->name + " " + std::to_string(threads));
  if (function->kernel != nullptr) {
    const auto& [x, y, z] = config.grid;
    emulation_error = emulation::run({function->kernel, {x, y, z}, threads, config.shared, params[0]});
    return emulation_error == nullptr ? 0 : kEmulationFailed;
  }
  const std::size_t bytes =
      state.arg_bytes.contains(function->name) ? state.arg_bytes[function->name] : state.recorded_bytes;
  FakeLaunch made;
  made.kernel = function->name;
  std::copy_n(config.grid, 3, made.grid);
  made.threads = threads;
  made.shared = config.shared;
  made.stream = config.stream;
  made.args.assign(static_cast<const char*>(params[0]), bytes);
  made.overlaps = config.attribute_count > 0 && config.attributes->value[0] != 0;
  state.launches.push_back(made);
  return 0;
}

}  // namespace

EXPORT cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void* stream, void** params, void** extra) {
  if (const int code = failing("cuLaunchKernel")) return code;
  return launch(function, {{gx, gy, gz}, {bx, by, bz}, shared, stream, nullptr, 0}, params, extra);
}
EXPORT cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** params, void** extra) {
  if (const int code = failing("cuLaunchKernelEx")) return code;
  constexpr int kProgrammaticStreamSerialization = 6;
  if (config->attribute_count != 1 || config->attributes->id != kProgrammaticStreamSerialization) return 1;
  return launch(function, *config, params, extra);
}
EXPORT cuStreamIsCapturing(void*, int* status) {
  *status = state.capture_status;
  return failing("cuStreamIsCapturing");
}
EXPORT cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}

namespace {

int allocate(unsigned long long* pointer, std::size_t bytes, const char* call) {
  if (const int code = failing(call)) return code;
  if (stack.empty()) return 201;
  const std::lock_guard lock(state.mutex);
  void* const made = std::malloc(bytes);
  if (made == nullptr) return 2;
  std::memset(made, 0xff, bytes);
  *pointer = reinterpret_cast<unsigned long long>(made);
  state.memory[*pointer] = {bytes, *stack.back()};
  note("allocate " + std::to_string(bytes));
  return 0;
}

int release(unsigned long long pointer) {
  const std::lock_guard lock(state.mutex);
  if (state.memory.erase(pointer) == 0) return 1;
  std::free(reinterpret_cast<void*>(pointer));  // NOLINT(performance-no-int-to-ptr)
  note("free");
  return 0;
}

/// Whether `bytes` from `pointer` on are device memory. Needs the lock.
bool holds(unsigned long long pointer, std::size_t bytes) {
  auto next = state.memory.upper_bound(pointer);
  if (next == state.memory.begin()) return false;
  const auto& [begin, block] = *--next;
  return pointer + bytes <= begin + block.bytes;
}

}  // namespace

EXPORT cuMemAlloc_v2(unsigned long long* pointer, std::size_t bytes) {
  return allocate(pointer, bytes, "cuMemAlloc_v2");
}
EXPORT cuMemFree_v2(unsigned long long pointer) {
  {
    const std::lock_guard lock(state.mutex);
    const auto found = state.memory.find(pointer);
    if (found == state.memory.end() || stack.empty() || stack.back()->id != found->second.context.id) return 201;
  }
  return release(pointer);
}
EXPORT cuMemPoolCreate(void** pool, const int* properties) {
  if (const int code = failing("cuMemPoolCreate"); code != 0) return code;
  constexpr int kPinned = 1, kOnDevice = 1;
  const int type = properties[0], location = properties[2], device = properties[3];
  if (type != kPinned || location != kOnDevice || device < 0 || device >= FakeCuda::kDevices) return 1;
  const std::lock_guard lock(state.mutex);
  *pool = &state.pools.emplace_back(FakePool{device, 0});
  return 0;
}
EXPORT cuMemPoolSetAttribute(FakePool* pool, int which, const std::uint64_t* value) {
  constexpr int kReleaseThreshold = 4;
  if (which != kReleaseThreshold) return 1;
  const std::lock_guard lock(state.mutex);
  pool->kept = *value;
  return 0;
}
EXPORT cuMemAllocFromPoolAsync(unsigned long long* pointer, std::size_t bytes, const FakePool* pool, void*) {
  if (stack.empty() || pool->device != stack.back()->device) return 1;
  return allocate(pointer, bytes, "cuMemAllocFromPoolAsync");
}
EXPORT cuMemFreeAsync(unsigned long long pointer, void*) { return release(pointer); }
// What the library does not call: memory of the host that tests make known to the device.
EXPORT cuMemHostRegister_v2(void* pointer, std::size_t bytes, unsigned) {
  if (stack.empty()) return 201;
  const std::lock_guard lock(state.mutex);
  state.memory[reinterpret_cast<unsigned long long>(pointer)] = {bytes, *stack.back()};
  return 0;
}
EXPORT cuMemHostUnregister(void* pointer) {
  const std::lock_guard lock(state.mutex);
  return state.memory.erase(reinterpret_cast<unsigned long long>(pointer)) == 1 ? 0 : 1;
}
EXPORT cuTensorMapEncodeTiled(void* map, int, unsigned rank, void* data, const unsigned long long* sizes,
                              const unsigned long long* strides, const unsigned* box, const unsigned* steps, int, int,
                              int, int) {
  emulation::BoxMap made = {};
  if (rank != emulation::BoxMap::kRank || reinterpret_cast<std::uintptr_t>(data) % 16 != 0) return 1;
  for (unsigned i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || box[i] == 0 || box[i] > 256 || steps[i] == 0 || steps[i] > 8) return 1;
    if (i + 1 < rank && (strides[i] % 16 != 0 || strides[i] >> 40 != 0)) return 1;
    made.size[i] = static_cast<std::uint32_t>(sizes[i]);
    made.box[i] = static_cast<std::uint16_t>(box[i]);
    made.step[i] = static_cast<std::uint8_t>(steps[i]);
    if (i + 1 < rank) made.stride[i] = strides[i];
  }
  made.data = static_cast<const unsigned char*>(data);
  made.rank = static_cast<std::uint8_t>(rank);
  std::memset(map, 0, 128);
  std::memcpy(map, &made, sizeof(made));
  const std::lock_guard lock(state.mutex);
  note("map");
  return 0;
}
EXPORT cuMemsetD8Async(unsigned long long pointer, unsigned char value, std::size_t bytes, void*) {
  const std::lock_guard lock(state.mutex);
  if (!holds(pointer, bytes)) return 1;
  std::memset(reinterpret_cast<void*>(pointer), value, bytes);  // NOLINT(performance-no-int-to-ptr)
  note("clear " + std::to_string(bytes));
  return 0;
}
EXPORT cuMemcpyHtoD_v2(unsigned long long to, const void* from, std::size_t bytes) {
  const std::lock_guard lock(state.mutex);
  if (!holds(to, bytes)) return 1;
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);  // NOLINT(performance-no-int-to-ptr)
  state.copied.assign(static_cast<const char*>(from), bytes);
  note("to device " + std::to_string(bytes));
  return 0;
}
EXPORT cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, std::size_t bytes, void*) {
  return cuMemcpyHtoD_v2(to, from, bytes);
}
EXPORT cuMemcpyDtoH_v2(void* to, unsigned long long from, std::size_t bytes) {
  const std::lock_guard lock(state.mutex);
  if (!holds(from, bytes)) return 1;
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);  // NOLINT(performance-no-int-to-ptr)
  note("to host " + std::to_string(bytes));
  return 0;
}
EXPORT cuEventCreate(Event** event, unsigned) {
  *event = new Event;
  return 0;
}
EXPORT cuEventDestroy_v2(Event* event) {
  delete event;
  return 0;
}
EXPORT cuEventRecord(Event*, void*) { return failing("cuEventRecord"); }
EXPORT cuEventSynchronize(Event*) { return failing("cuEventSynchronize"); }
EXPORT cuEventElapsedTime(float* milliseconds, Event*, Event*) {
  *milliseconds = 0.25F;
  return 0;
}
EXPORT cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  const std::lock_guard lock(state.mutex);
  if (attribute != 9) return 1;
  if (pointer < FakeCuda::kDevices) {  // also "device memory": addresses 0 and 1
    *static_cast<int*>(value) = static_cast<int>(pointer);
    return 0;
  }
  if (!holds(pointer, 1)) return 1;
  *static_cast<int*>(value) = std::prev(state.memory.upper_bound(pointer))->second.context.device;
  return 0;
}

extern "C" __attribute__((visibility("default"))) FakeCuda* fake_cuda_state() { return &state; }
