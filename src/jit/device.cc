#include "jit/device.h"

#include <array>
#include <deque>
#include <mutex>

#include "jit/driver.h"
#include "vicus/error.h"

namespace vicus::jit {
namespace {

Device ask(int ordinal) {
  const Driver& d = driver();
  const auto attribute = [&](CUdevice_attribute which) {
    int value = 0;
    check(d.cuDeviceGetAttribute(&value, which, ordinal), "cuDeviceGetAttribute");
    return value;
  };
  std::array<char, 256> name{};
  check(d.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, ordinal), "cuDeviceGetName");
  return {.ordinal = ordinal,
          .name = name.data(),
          .arch = {attribute(kComputeCapabilityMajor), attribute(kComputeCapabilityMinor)},
          .multiprocessors = attribute(kMultiprocessorCount),
          .shared_bytes_per_block = attribute(kMaxSharedMemoryPerBlockOptin),
          .shared_bytes_per_multiprocessor = attribute(kMaxSharedMemoryPerMultiprocessor),
          .l2_bytes = attribute(kL2CacheSize)};
}

const std::deque<Device>& devices() {
  static const std::deque<Device> all = [] {
    int count = 0;
    check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
    std::deque<Device> list;
    for (int ordinal = 0; ordinal < count; ++ordinal) list.push_back(ask(ordinal));
    return list;
  }();
  return all;
}

/// What each device has one of, made by `make(ordinal)` when it is first asked for. Made once and for good: to release it
/// with work in flight, or at exit, is what must not happen.
template <class Handle, class Make>
Handle once_for(int ordinal, const Make& make) {
  static std::mutex mutex;
  static std::deque<Handle> made(devices().size());
  const std::lock_guard lock(mutex);
  Handle& handle = made.at(static_cast<std::size_t>(device(ordinal).ordinal));
  if (handle == nullptr) handle = make(ordinal);
  return handle;
}

CUcontext retain_primary_context(int ordinal) {
  CUcontext context = nullptr;
  check(driver().cuDevicePrimaryCtxRetain(&context, ordinal), "cuDevicePrimaryCtxRetain");
  return context;
}

CUmemoryPool make_memory_pool(int ordinal) {
  const RelaxedCapture relaxed;
  constexpr std::uint64_t kKeptBytes = std::uint64_t{1} << 30;
  const CUmemPoolProps properties{.id = ordinal};
  CUmemoryPool pool = nullptr;
  check(driver().cuMemPoolCreate(&pool, &properties), "cuMemPoolCreate", "preparing scratch memory");
  std::uint64_t kept = kKeptBytes;
  check(driver().cuMemPoolSetAttribute(pool, kPoolReleaseThreshold, &kept), "cuMemPoolSetAttribute");
  return pool;
}

}  // namespace

int device_count() {
  static_cast<void>(driver());
  return static_cast<int>(devices().size());
}

const Device& device(int ordinal) {
  if (ordinal < 0 || ordinal >= device_count()) {
    throw InvalidArgument("device", std::to_string(ordinal), "0 to " + std::to_string(device_count() - 1));
  }
  return devices()[static_cast<std::size_t>(ordinal)];
}

int device_of(const void* pointer) {
  int ordinal = -1;
  const CUresult result =
      driver().cuPointerGetAttribute(&ordinal, kPointerDeviceOrdinal, reinterpret_cast<CUdeviceptr>(pointer));
  if (result == kCudaInvalidValue) return -1;  // not memory that CUDA knows
  check(result, "cuPointerGetAttribute");
  return ordinal;
}

CUmemoryPool memory_pool(int ordinal) { return once_for<CUmemoryPool>(ordinal, make_memory_pool); }

const Device& current_device() {
  static_cast<void>(current_context());
  CUdevice ordinal = 0;
  check(driver().cuCtxGetDevice(&ordinal), "cuCtxGetDevice");
  return device(ordinal);
}

int thread_device() {
  CUdevice ordinal = 0;
  if (thread_context() != nullptr) check(driver().cuCtxGetDevice(&ordinal), "cuCtxGetDevice");
  return ordinal;
}

CUcontext thread_context() {
  CUcontext context = nullptr;
  check(driver().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  return context;
}

std::uint64_t current_context() {
  const Driver& d = driver();
  const CUcontext context = thread_context();
  if (context == nullptr) throw Unsupported("this thread has no CUDA context");
  if (d.cuCtxGetId == nullptr) return reinterpret_cast<std::uintptr_t>(context);
  unsigned long long id = 0;
  check(d.cuCtxGetId(context, &id), "cuCtxGetId");
  return id;
}

ContextGuard::ContextGuard(int ordinal) {
  const Driver& d = driver();
  CUdevice current = -1;
  if (thread_context() != nullptr) check(d.cuCtxGetDevice(&current), "cuCtxGetDevice");
  if (current == ordinal) return;
  check(d.cuCtxPushCurrent(once_for<CUcontext>(ordinal, retain_primary_context)), "cuCtxPushCurrent");
  pushed_ = true;
}

ContextGuard::ContextGuard(CUcontext context) {
  check(driver().cuCtxPushCurrent(context), "cuCtxPushCurrent");
  pushed_ = true;
}

ContextGuard::~ContextGuard() {
  CUcontext popped = nullptr;
  if (pushed_) driver().cuCtxPopCurrent(&popped);
}

}  // namespace vicus::jit
