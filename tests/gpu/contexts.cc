// Attention in several CUDA contexts of one device, made by the driver: test_gpu_contexts.py starts it on a machine that
// has one.
//
//   gpu_contexts     the same bits in every context; a line for each problem, exit code 1 where they differ
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <future>
#include <iostream>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "vicus/vicus.hpp"

namespace vicus {
namespace {

constexpr int kRounds = 20;

/// What of the driver makes and ends contexts. Opened here, so that the library has no part in it.
class Driver {
 public:
  Driver() : library_(::dlopen("libcuda.so.1", RTLD_NOW)) {
    if (library_ == nullptr) throw std::runtime_error(::dlerror());
    check(entry<int(unsigned)>("cuInit")(0), "cuInit");
  }

  [[nodiscard]] void* make_context() const {
    void* context = nullptr;
    check(entry<int(void**, unsigned, int)>("cuCtxCreate_v2")(&context, 0, 0), "cuCtxCreate");
    enter(nullptr);
    return context;
  }
  /// Makes it the thread's; null: the thread has none.
  void enter(void* context) const { check(entry<int(void*)>("cuCtxSetCurrent")(context), "cuCtxSetCurrent"); }
  void destroy(void* context) const { check(entry<int(void*)>("cuCtxDestroy_v2")(context), "cuCtxDestroy"); }

 private:
  template <class Function>
  [[nodiscard]] Function* entry(const char* name) const {
    void* const found = ::dlsym(library_, name);
    if (found == nullptr) throw std::runtime_error(::dlerror());
    return reinterpret_cast<Function*>(found);
  }
  static void check(int code, const char* call) {
    if (code != 0) throw std::runtime_error(std::string(call) + " gave " + std::to_string(code));
  }

  void* library_;
};

using Bytes = std::vector<std::byte>;
using Results = std::vector<Bytes>;

/// Numbers of magnitude 1/8 to 1 in every type, by their bits.
Bytes numbers(DType dtype, std::size_t count, std::uint64_t seed) {
  Bytes bytes(count * dtype_size(dtype));
  for (std::size_t i = 0; i < count; ++i) {
    seed = seed * 6364136223846793005U + 1442695040888963407U;
    const std::uint64_t random = seed >> 12, sign = random & 1, exponent = (random >> 1) % 3;
    const auto put = [&](auto word) { std::memcpy(bytes.data() + i * sizeof(word), &word, sizeof(word)); };
    switch (dtype) {
      case DType::bfloat16:
        put(static_cast<std::uint16_t>(sign << 15 | (124 + exponent) << 7 | (random >> 8 & 0x7f)));
        break;
      case DType::float16:
        put(static_cast<std::uint16_t>(sign << 15 | (12 + exponent) << 10 | (random >> 8 & 0x3ff)));
        break;
      case DType::float32:
        put(static_cast<std::uint32_t>(sign << 31 | (124 + exponent) << 23 | (random >> 8 & 0x7fffff)));
        break;
      case DType::float64:
        put(sign << 63 | (1020 + exponent) << 52 | random);
        break;
    }
  }
  return bytes;
}

struct Tensor {
  Tensor(DType dtype, const std::vector<std::int64_t>& shape)
      : layout{std::span<const std::int64_t>(shape)},
        memory(static_cast<std::size_t>(layout.numel()) * dtype_size(dtype)),
        view(memory.data(), dtype, layout) {}
  Tensor(DType dtype, const std::vector<std::int64_t>& shape, std::uint64_t seed) : Tensor(dtype, shape) {
    memory.write(numbers(dtype, static_cast<std::size_t>(layout.numel()), seed).data());
  }
  [[nodiscard]] Bytes bytes() const {
    Bytes read(memory.bytes());
    memory.read(read.data());
    return read;
  }

  TensorLayout layout;
  DeviceMemory memory;
  TensorView view;
};

/// Both passes of a plan in the context of this thread, with memory of that context; nothing is added by atomics.
Results run(const Plan& plan) {
  const Problem& p = plan.problem;
  const DType sums = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  const Tensor query(p.dtype, p.query_shape(), 1), key(p.dtype, p.key_shape(), 2), value(p.dtype, p.value_shape(), 3);
  const Tensor arriving(p.dtype, p.output_shape(), 4);
  const Tensor output(p.dtype, p.output_shape()), logsumexp(sums, p.logsumexp_shape());
  const Tensor grad_query(p.dtype, p.query_shape()), grad_key(p.dtype, p.key_shape()),
      grad_value(p.dtype, p.value_shape());
  const AttentionInputs inputs{.query = query.view, .key = key.view, .value = value.view};
  forward(plan, inputs, output.view, logsumexp.view);
  backward(plan, inputs, {.output = output.view, .logsumexp = logsumexp.view, .grad_output = arriving.view},
           {.query = grad_query.view, .key = grad_key.view, .value = grad_value.view});
  Results found;
  for (const Tensor* tensor : {&output, &logsumexp, &grad_query, &grad_key, &grad_value}) {
    found.push_back(tensor->bytes());
  }
  return found;
}

std::vector<std::pair<std::string, Plan>> plans() {
  std::vector<std::pair<std::string, Plan>> list;
  const auto add = [&](const std::string& name, DType dtype, AxisValues layout, std::int64_t dim, auto mask) {
    Problem p;
    p.dtype = dtype;
    p.batch = 2;
    p.layout = layout;
    p.heads = 4;
    p.heads_kv = 2;
    p.head_dim = dim;
    p.mask = mask;
    for (const Engine engine : {Engine::sm80, Engine::sm90}) {
      try {
        list.emplace_back(name + ", " + std::string(engine_name(engine)),
                          choose_plan(p, {.engine = engine, .backward = {.deterministic = true}}));
      } catch (const Unsupported&) {  // sm90 is not for every problem and device; test_gpu_contexts.py counts
        continue;
      }
    }
  };
  add("2d", DType::bfloat16, {40, 41}, 64, Neighborhood{.kernel_size = 7});
  add("dense", DType::float16, {300}, 128, Dense{.keys = 310, .causal = Causal::bottom_right});
  add("float32", DType::float32, {20, 21}, 32, Neighborhood{.kernel_size = 5, .dilation = 2});
  add("float64", DType::float64, {100}, 24, Neighborhood{.kernel_size = 9});
  return list;
}

/// Names of what differed.
std::vector<std::string> differences(const Driver& driver, const Plan& plan) {
  std::vector<std::string> found;
  const Results expected = run(plan);  // in the primary context
  const auto compare = [&](const std::string& where) {
    if (run(plan) != expected) found.push_back(where);
  };
  void *const one = driver.make_context(), *two = driver.make_context();
  driver.enter(one);
  compare("a second context");
  driver.enter(two);
  compare("a third context");
  driver.enter(one);
  compare("the second context again");
  // A context that has the place of one that ended has none of its kernels.
  driver.enter(nullptr);
  driver.destroy(two);
  two = driver.make_context();
  driver.enter(two);
  compare("a context after another");
  driver.enter(nullptr);
  compare("the primary context again");

  std::vector<std::future<int>> wrong;
  for (void* const context : {static_cast<void*>(nullptr), one, two}) {
    wrong.push_back(std::async(std::launch::async, [&, context] {
      driver.enter(context);
      int count = 0;
      for (int round = 0; round < kRounds; ++round) count += run(plan) != expected;
      return count;
    }));
  }
  for (std::size_t i = 0; i < wrong.size(); ++i) {
    const int count = wrong[i].get();
    if (count > 0) found.push_back("thread " + std::to_string(i) + ", " + std::to_string(count) + " times");
  }

  {
    driver.enter(one);
    const Tensor kept(DType::float32, {1000}, 5);
    driver.enter(two);
    if (kept.bytes() != numbers(DType::float32, 1000, 5)) found.emplace_back("memory read from another context");
  }
  driver.enter(nullptr);
  driver.destroy(two);
  driver.destroy(one);
  compare("the primary context after all others");
  return found;
}

}  // namespace
}  // namespace vicus

int main() {
  int status = 0;
  try {
    const vicus::Driver driver;
    for (const auto& [name, plan] : vicus::plans()) {
      const std::vector<std::string> found = vicus::differences(driver, plan);
      std::cout << name << ": " << (found.empty() ? "the same everywhere" : "differs") << std::endl;
      for (const std::string& where : found) std::cout << "  " << where << std::endl;
      if (!found.empty()) status = 1;
    }
  } catch (const std::exception& error) {
    std::cerr << "gpu_contexts: " << error.what() << '\n';
    status = 2;
  }
  return status;
}
