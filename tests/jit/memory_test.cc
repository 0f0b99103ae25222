// Device memory is of the context that it was made in, wherever it is used and ends.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_tensor.h"
#include "fake_cuda.h"
#include "hopper_problems.h"
#include "jit/device.h"
#include "jit/driver.h"
#include "vicus/vicus.hpp"

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

// Scratch of one block.
class Source : public ScratchSource {
 public:
  void* take(std::size_t bytes, void* stream) override {
    if (fails) throw Unsupported("nothing left");
    EXPECT_EQ(stream, expected) << "the caller's stream";
    EXPECT_EQ(block, nullptr);
    taken.push_back(bytes);
    block = std::make_unique<DeviceMemory>(bytes);
    return block->data();
  }
  void give_back(void* data, void* stream) noexcept override {
    EXPECT_EQ(stream, expected);
    EXPECT_EQ(block->data(), data);
    block.reset();
  }

  void* expected = nullptr;
  std::unique_ptr<DeviceMemory> block;
  std::vector<std::size_t> taken;
  bool fails = false;
};

TEST_F(Memory, ScratchOfCallsIsTheThreadsOwn) {
  const Plan plan = choose_plan(testing::problem_of({80, 90}, {.kernel_size = 31}, 128),
                                {.engine = Engine::sm90, .gpu = testing::kH100});
  const Problem& p = plan.problem;
  const testing::Tensor query(p.dtype, p.query_shape()), key(p.dtype, p.key_shape()), value(p.dtype, p.value_shape());
  const testing::Tensor output(p.dtype, p.output_shape()), logsumexp(DType::float32, p.logsumexp_shape());
  const testing::Tensor dq(p.dtype, p.query_shape()), dk(p.dtype, p.key_shape());
  int stream = 0;
  // What the driver did.
  const auto events = [&] {
    {
      const std::lock_guard lock(fake.mutex);
      fake.events.clear();
    }
    backward(plan, {.query = query.view, .key = key.view, .value = value.view},
             {.output = output.view, .logsumexp = logsumexp.view, .grad_output = output.view},
             {.query = dq.view, .key = dk.view}, &stream);
    const std::lock_guard lock(fake.mutex);
    return fake.events;
  };
  const auto launches = [](const std::vector<std::string>& list) {
    return std::count_if(list.begin(), list.end(), [](const std::string& e) { return e.starts_with("launch"); });
  };
  const std::string own = "allocate " + std::to_string(plan.gpu.backward.scratch_bytes);
  const auto alone = events();
  EXPECT_EQ(std::count(alone.begin(), alone.end(), own), 1);
  {
    Source outer;
    outer.fails = true;
    {
      Source source;
      source.expected = &stream;
      EXPECT_EQ(launches(events()), 3) << "delta, of keys, convert";
      EXPECT_EQ(source.taken, std::vector<std::size_t>{plan.gpu.backward.scratch_bytes});
      EXPECT_EQ(source.block, nullptr) << "given back";
      std::thread([&] { EXPECT_EQ(events(), alone) << "another thread has none"; }).join();
    }
    EXPECT_THROW(events(), Unsupported) << "the one before is back";
    const std::lock_guard lock(fake.mutex);
    EXPECT_EQ(launches(fake.events), 0);
  }
  EXPECT_EQ(events(), alone);
}

}  // namespace
}  // namespace vicus
