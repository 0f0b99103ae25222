// Kernels by key, launches, devices and contexts, graph capture, fork: on a driver that only keeps a record.
#include "jit/module.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <thread>
#include <vector>

#include "fake_cuda.h"
#include "vicus/error.h"

namespace vicus::jit {
namespace {

using vicus::testing::fake_cuda;
using vicus::testing::FakeContext;
using vicus::testing::FakeCuda;
using vicus::testing::FakeLaunch;

/// What an engine describes a kernel by.
struct Key {
  int head_dim = 64, tile = 0;
  friend bool operator<(const Key& a, const Key& b) {
    return a.head_dim != b.head_dim ? a.head_dim < b.head_dim : a.tile < b.tile;
  }
};

struct Args {
  long long a = 1, b = 2, c = 3;
};
static_assert(sizeof(Args) == FakeCuda::kArgBytes);

int compilations() {
  std::ifstream in(std::getenv("FAKE_NVRTC_LOG"));
  int lines = 0;
  for (std::string line; std::getline(in, line);) ++lines;
  return lines;
}

/// What `call` throws, which must be an `Error`.
template <class Error, class Call>
std::string message(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no error, or another";
  return {};
}

#define EXPECT_CONTAINS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

class Module : public ::testing::Test {
 protected:
  Module() {
    const std::lock_guard lock(fake.mutex);
    fake.failing_call.clear();
    fake.capture_status = 0;
    fake.launches.clear();
    ++run;  // texts that no test before had
  }

  Source source(const Key& key) {
    ++made;
    return {.file = "",
            .prologue = "constexpr int kRun = " + std::to_string(run) + ", kHeadDim = " + std::to_string(key.head_dim) +
                        ", kTile = " + std::to_string(key.tile) +
                        ";\nextern \"C\" __global__ void attend(Args args) {}"};
  }
  const Kernel& get(const Key& key, void* stream = nullptr) {
    return cache.get(key, stream, [this](const Key& k) { return source(k); });
  }
  void fail(const std::string& call, int code) {
    const std::lock_guard lock(fake.mutex);
    fake.failing_call = call;
    fake.failing_code = code;
  }

  static inline int run = 0;
  FakeCuda& fake = fake_cuda();
  KernelCache<Key> cache;
  std::atomic<int> made{0};
};

TEST_F(Module, AKernelIsMadeOncePerKeyAndFoundAfterwards) {
  const ContextGuard guard(0);
  const int loads = fake.loads, relaxed = fake.relaxed_loads, sets = fake.attribute_sets, compiled = compilations();
  const Kernel& kernel = get({64, 1});
  EXPECT_EQ(kernel.registers, 40);
  EXPECT_EQ(kernel.local_bytes, 16);
  EXPECT_EQ(kernel.shared_bytes, 100);
  EXPECT_EQ(kernel.arg_bytes, sizeof(Args));
  EXPECT_EQ(kernel.name, "attend of kernel.cu");
  EXPECT_EQ(fake.dynamic_shared_bytes, FakeCuda::kSharedBytes - 100);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(&get({64, 1}), &kernel);
  EXPECT_EQ(made, 1);
  EXPECT_NE(&get({64, 2}), &kernel);
  EXPECT_NE(&get({32, 1}), &kernel);
  EXPECT_EQ(&get({64, 1}), &kernel);
  EXPECT_EQ(made, 3);
  EXPECT_EQ(fake.loads - loads, 3);
  EXPECT_EQ(fake.relaxed_loads - relaxed, 3) << "loading must not disturb a capture on another thread";
  EXPECT_EQ(fake.attribute_sets - sets, 3);
  EXPECT_EQ(compilations() - compiled, 3);
}

TEST_F(Module, ManyThreadsMakeAKernelOnce) {
  const int loads = fake.loads, compiled = compilations();
  std::atomic<int> waiting{8};
  std::vector<const Kernel*> kernels(8 * 3);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      const ContextGuard guard(0);
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      for (std::size_t i = 0; i < 3; ++i) kernels[8 * i + t] = &get({static_cast<int>(i), 0});
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < kernels.size(); ++i) EXPECT_EQ(kernels[i], kernels[i / 8 * 8]);
  EXPECT_EQ(made, 3);
  EXPECT_EQ(fake.loads - loads, 3);
  EXPECT_EQ(compilations() - compiled, 3);
}

TEST_F(Module, AnotherProcessWouldFindItOnDisk) {
  const ContextGuard guard(0);
  get({64, 1});
  const int compiled = compilations();
  KernelCache<Key> other;
  const int loads = fake.loads;
  other.get(Key{64, 1}, nullptr, [this](const Key& k) { return source(k); });
  EXPECT_EQ(fake.loads - loads, 1);
  EXPECT_EQ(compilations(), compiled);
}

TEST_F(Module, DevicesAndContextsHaveKernelsOfTheirOwn) {
  const Kernel *on_a = nullptr, *on_b = nullptr, *in_other = nullptr;
  {
    const ContextGuard guard(0);
    EXPECT_EQ(current_device().name, "Fake A");
    on_a = &get({});
    {
      const ContextGuard inner(1);
      EXPECT_EQ(current_device().arch, (Arch{9, 0}));
      on_b = &get({});
    }
    EXPECT_EQ(current_device().ordinal, 0);
    EXPECT_EQ(&get({}), on_a);
  }
  FakeContext other{0, 7};
  check(driver().cuCtxPushCurrent(reinterpret_cast<CUcontext>(&other)), "cuCtxPushCurrent");
  {
    const ContextGuard guard(0);
    EXPECT_EQ(current_context(), 7U) << "a context of the right device is kept";
    in_other = &get({});
  }
  other.id = 8;  // destroyed, and a new one at the same place
  EXPECT_NE(&get({}), in_other);
  CUcontext popped = nullptr;
  check(driver().cuCtxPopCurrent(&popped), "cuCtxPopCurrent");
  EXPECT_NE(on_a, on_b);
  EXPECT_NE(on_a, in_other);
  EXPECT_EQ(made, 4);
  EXPECT_LE(fake.retained, 2) << "a primary context is retained once";
}

TEST_F(Module, AThreadWithoutAContextIsToldSo) {
  EXPECT_CONTAINS(message<Unsupported>([&] { get({}); }), "no CUDA context");
  EXPECT_EQ(made, 0);
}

TEST_F(Module, DevicesAreDescribed) {
  ASSERT_EQ(device_count(), 2);
  EXPECT_EQ(device(0).arch, (Arch{8, 0}));
  EXPECT_EQ(device(1).multiprocessors, 109);
  EXPECT_EQ(device(1).shared_bytes_per_block, FakeCuda::kSharedBytes);
  EXPECT_EQ(device(1).shared_bytes_per_multiprocessor, FakeCuda::kSharedBytes + 1024);
  EXPECT_EQ(device(1).l2_bytes, 40 << 20);
  for (const int wrong : {-1, 2}) EXPECT_CONTAINS(message<InvalidArgument>([&] { (void)device(wrong); }), "0 to 1");
  EXPECT_THROW(ContextGuard{2}, InvalidArgument);
  EXPECT_EQ(device_of(reinterpret_cast<const void*>(1)), 1);
  EXPECT_EQ(device_of(&fake), -1);
}

TEST_F(Module, WhatIsNotWarmIsRefusedDuringCapture) {
  const ContextGuard guard(0);
  const Kernel& warm = get({1, 1});
  fake.capture_status = 1;
  EXPECT_EQ(&get({1, 1}), &warm);
  const std::string text = message<Unsupported>([&] { get({2, 2}); });
  EXPECT_CONTAINS(text, "CUDA graph");
  EXPECT_CONTAINS(text, "warmup");
  EXPECT_EQ(made, 1) << "nothing was compiled";
  fake.capture_status = 2;
  EXPECT_THROW(get({2, 2}), Unsupported);
  fake.capture_status = 0;
  fail("cuStreamIsCapturing", 906);
  EXPECT_THROW(get({2, 2}), Unsupported) << "the legacy stream cannot be asked while another is captured";
  fail("cuStreamIsCapturing", 700);
  EXPECT_THROW(get({2, 2}), DriverError);
  fail("", 0);
  get({2, 2});
  EXPECT_EQ(made, 2);
}

TEST_F(Module, LaunchPassesEverythingOn) {
  const ContextGuard guard(0);
  const Kernel& kernel = get({});
  const Args args{5, 6, 7};
  int stream = 0;
  launch(kernel, {3, 4, 5}, 128, 60000, &stream, &args, sizeof(args));
  ASSERT_EQ(fake.launches.size(), 1U);
  const FakeLaunch& seen = fake.launches[0];
  EXPECT_EQ(seen.kernel, "attend");
  EXPECT_EQ(seen.grid[0], 3U);
  EXPECT_EQ(seen.grid[1], 4U);
  EXPECT_EQ(seen.grid[2], 5U);
  EXPECT_EQ(seen.threads, 128U);
  EXPECT_EQ(seen.shared, 60000U);
  EXPECT_EQ(seen.stream, &stream);
  EXPECT_EQ(seen.args, std::string(reinterpret_cast<const char*>(&args), sizeof(args)));
  EXPECT_EQ(blocks_per_multiprocessor(kernel, 256, 100000), 6);
}

TEST_F(Module, OverlapsWhereTheDeviceCan) {
  const Args args;
  for (const int device : {0, 1}) {  // of sm_80 and sm_90
    const ContextGuard guard(device);
    const Kernel& kernel = get({});
    for (const bool overlap : {false, true}) {
      launch(kernel, {1, 1, 1}, 128, 0, nullptr, &args, sizeof(args), overlap);
      EXPECT_EQ(fake.launches.back().overlaps, overlap && device == 1);
    }
  }
  const ContextGuard guard(1);
  fail("cuLaunchKernelEx", 700);
  EXPECT_CONTAINS(message<DriverError>([&] { launch(get({}), {1, 1, 1}, 128, 0, nullptr, &args, sizeof(args), true); }),
                  "cuLaunchKernelEx");
}

TEST_F(Module, AnEmptyGridLaunchesNothing) {
  const ContextGuard guard(0);
  const Kernel& kernel = get({});
  const Args args;
  for (const Dim3 grid : {Dim3{0, 1, 1}, Dim3{1, 0, 1}, Dim3{1, 1, 0}}) {
    launch(kernel, grid, 128, 0, nullptr, &args, sizeof(args));
  }
  EXPECT_TRUE(fake.launches.empty());
}

TEST_F(Module, ArgumentsOfAnotherSizeAreNotLaunched) {
  const ContextGuard guard(0);
  const Kernel& kernel = get({});
  const Args args;
  const std::string text =
      message<std::logic_error>([&] { launch(kernel, {1, 1, 1}, 128, 0, nullptr, &args, sizeof(args) - 8); });
  EXPECT_CONTAINS(text, "24");
  EXPECT_CONTAINS(text, "16");
  EXPECT_TRUE(fake.launches.empty());
}

TEST_F(Module, DriverErrorsNameCallAndCode) {
  const ContextGuard guard(0);
  fail("cuModuleLoadData", 209);
  try {
    get({});
    ADD_FAILURE();
  } catch (const DriverError& error) {
    EXPECT_EQ(error.call(), "cuModuleLoadData");
    EXPECT_EQ(error.code(), 209);
    const std::string text = error.what();
    for (const char* const part : {"cuModuleLoadData", "209", "what the driver says", "kernel.cu", "Fake A", "sm_80"}) {
      EXPECT_CONTAINS(text, part);
    }
  }
  fail("", 0);
  const Kernel& kernel = get({});  // a failure is not remembered
  fail("cuLaunchKernel", 700);
  const Args args;
  const std::string text =
      message<DriverError>([&] { launch(kernel, {3, 4, 5}, 128, 60000, nullptr, &args, sizeof(args)); });
  for (const char* const part : {"cuLaunchKernel", "ILLEGAL_ADDRESS", "700", "3 x 4 x 5", "128", "60000", "attend"}) {
    EXPECT_CONTAINS(text, part);
  }
  for (const char* const call : {"cuCtxGetCurrent", "cuFuncGetAttribute"}) {
    fail(call, 999);
    EXPECT_CONTAINS(message<DriverError>([&] { get({9, 9}); }), call);
  }
}

TEST_F(Module, CompileErrorsCarryTheLogAndAreNotRemembered) {
  const ContextGuard guard(0);
  const auto bad = [](const Key&) { return Source{.file = "", .prologue = "#error no"}; };
  try {
    cache.get(Key{}, nullptr, bad);
    ADD_FAILURE();
  } catch (const CompileError& error) {
    EXPECT_EQ(error.log(), "kernel.cu(1): error: #error directive");
    const std::string text = error.what();
    for (const char* const part : {"kernel.cu", "NVRTC 13.1", "sm_80", "#error directive"}) EXPECT_CONTAINS(text, part);
  }
  EXPECT_EQ(get({}).registers, 40);
}

TEST_F(Module, AChildOfForkIsToldThatCudaIsGone) {
  const ContextGuard guard(0);
  const Kernel& kernel = get({});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto refused = [](const auto& call) {
      try {
        call();
      } catch (const Unsupported& error) {
        return std::string(error.what()).find("fork") != std::string::npos;
      }
      return false;
    };
    const Args args;
    ::_exit((refused([&] { get({}); }) && refused([&] { get({77, 7}); }) &&
             refused([&] { launch(kernel, {1, 1, 1}, 32, 0, nullptr, &args, sizeof(args)); }) &&
             refused([] { (void)device_count(); }))
                ? 0
                : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(&get({}), &kernel) << "the parent goes on";
}

}  // namespace
}  // namespace vicus::jit
