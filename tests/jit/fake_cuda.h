// What the tests see of the driver that they bring along (fake_cuda.cc): its contexts, what it was asked for, and which
// of its calls shall fail. Two devices, of sm_80 and sm_90. Memory of the device is memory of the host, on the device of
// the context that asked for it, and NaN at first. Kernels do nothing, but for those that were compiled for this machine
// (tests/emulation), which run before their launch returns.
//
// Environment, for other processes: FAKE_CUDA_FAILS "cuInit 100"; FAKE_CUDA_LOG, a file that gets the events;
// FAKE_CUDA_SHARED_BYTES "166912 232448", of the devices' blocks.
#ifndef VICUS_TESTS_JIT_FAKE_CUDA_H_
#define VICUS_TESTS_JIT_FAKE_CUDA_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace vicus::testing {

struct FakeContext {
  int device;
  unsigned long long id;
};

struct FakeMemory {
  std::size_t bytes;
  FakeContext context;  // that asked for it, as it was then
};

struct FakeLaunch {
  std::string kernel;
  unsigned grid[3] = {}, threads = 0, shared = 0;
  void* stream = nullptr;
  std::string args;
  bool overlaps = false;  // may begin before the launch ahead of it ends
};

struct FakePool {
  int device;
  std::uint64_t kept;  // bytes
};

struct FakeCuda {
  static constexpr int kDevices = 2;
  static constexpr int kSharedBytes = 100000;   // per block; kernels have 100 static ones
  static constexpr std::size_t kArgBytes = 24;  // of the argument of kernel "attend"

  std::atomic<int> loads{0}, retained{0}, attribute_sets{0}, dynamic_shared_bytes{0}, relaxed_loads{0};
  std::atomic<int> capture_status{0};
  std::mutex mutex;                        // of the rest
  std::size_t recorded_bytes = kArgBytes;  // of the arguments of a launch, where the next does not say
  std::string failing_call;
  int failing_code = 0;
  std::map<std::string, std::size_t> arg_bytes = {{"attend", kArgBytes}};  // of kernels whose argument is known
  std::vector<FakeLaunch> launches;
  std::string copied;  // to the device, last
  std::vector<std::string>
      events;  // "launch NAME THREADS", "allocate BYTES", "free", "clear BYTES", "to device BYTES", ...
  std::map<unsigned long long, FakeMemory> memory;  // by address
  std::deque<FakePool> pools;                       // all that were made
  std::array<FakeContext, kDevices> primary = {{{0, 101}, {1, 102}}};
};

/// The state of the library that VICUS_CUDA_DRIVER names.
FakeCuda& fake_cuda();

}  // namespace vicus::testing

#endif  // VICUS_TESTS_JIT_FAKE_CUDA_H_
