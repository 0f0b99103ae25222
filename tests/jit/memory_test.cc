// Device memory is of the context that it was made in, wherever it is used and ends.
#include <gtest/gtest.h>

#include <array>
#include <utility>

#include "fake_cuda.h"
#include "jit/device.h"
#include "jit/driver.h"
#include "vicus/device.h"

namespace vicus {
namespace {

using vicus::testing::fake_cuda;
using vicus::testing::FakeContext;
using vicus::testing::FakeCuda;

class Memory : public ::testing::Test {
 protected:
  Memory() : blocks_before(blocks()) {}
  void TearDown() override { fail_next(""); }

  std::size_t blocks() {
    const std::lock_guard lock(fake.mutex);
    return fake.memory.size();
  }
  unsigned long long context_of(const DeviceMemory& memory) {
    const std::lock_guard lock(fake.mutex);
    return fake.memory.at(reinterpret_cast<unsigned long long>(memory.data())).context.id;
  }
  void fail_next(const char* call) {
    const std::lock_guard lock(fake.mutex);
    fake.failing_call = call;
    fake.failing_code = 4;
  }

  FakeCuda& fake = fake_cuda();
  FakeContext other{0, 31};
  std::size_t blocks_before;
};

TEST_F(Memory, IsOfTheContextItWasMadeIn) {
  std::array<char, 5> sent{"four"}, came{};
  DeviceMemory kept;
  {
    const jit::ContextGuard guard(reinterpret_cast<jit::CUcontext>(&other));
    DeviceMemory made(sent.size());
    EXPECT_EQ(context_of(made), 31U);
    made.write(sent.data());
    kept = std::move(made);
  }
  EXPECT_EQ(jit::thread_context(), nullptr);
  kept.read(came.data());
  EXPECT_EQ(came, sent);
  const DeviceMemory elsewhere(8);
  EXPECT_EQ(context_of(elsewhere), fake.primary[0].id) << "a thread without a context gets the primary one";
  kept = DeviceMemory();
  EXPECT_EQ(blocks() - blocks_before, 1U) << "freed where it was taken";
}

TEST_F(Memory, OfAnotherDeviceThanTheThreads) {
  const jit::ContextGuard guard(reinterpret_cast<jit::CUcontext>(&other));
  {
    const DeviceMemory memory(8, 1);
    EXPECT_EQ(context_of(memory), fake.primary[1].id);
  }
  EXPECT_EQ(blocks(), blocks_before);
}

TEST_F(Memory, OutlivesTheDriverInPeace) {
  const void* data = nullptr;
  {
    const DeviceMemory memory(8);
    data = memory.data();
    fail_next("cuCtxPushCurrent_v2");
  }
  EXPECT_EQ(blocks() - blocks_before, 1U);
  fail_next("");
  const jit::ContextGuard guard(0);
  EXPECT_EQ(jit::driver().cuMemFree(reinterpret_cast<jit::CUdeviceptr>(data)), 0);
}

}  // namespace
}  // namespace vicus
