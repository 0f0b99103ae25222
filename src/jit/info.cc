#include <exception>

#include "jit/cache.h"
#include "jit/device.h"
#include "jit/driver.h"
#include "jit/library.h"
#include "jit/nvrtc.h"
#include "vicus/info.h"

namespace vicus {
namespace {

/// Runs `ask`; what it throws is the problem.
template <class Ask>
std::string problem_of(const Ask& ask) {
  try {
    ask();
    return {};
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

GpuRuntime gpu_runtime() {
  GpuRuntime runtime;
  runtime.driver_problem = problem_of([&] {
    const jit::Driver& driver = jit::driver();
    runtime.driver_library = driver.path;
    runtime.driver_version = std::to_string(driver.version / 1000) + "." + std::to_string(driver.version % 1000 / 10);
    for (int i = 0; i < jit::device_count(); ++i) {
      const jit::Device& device = jit::device(i);
      runtime.devices.push_back({device.name, device.arch.major, device.arch.minor, device.multiprocessors});
    }
  });
  runtime.compiler_problem = problem_of([&] {
    const jit::Nvrtc& compiler = jit::nvrtc();
    runtime.compiler_library = compiler.path();
    runtime.compiler_version = compiler.version();
    runtime.compiler_architectures = compiler.architectures();
    runtime.compiler_found_in = compiler.found_in();
  });
  runtime.prebuilt_directory = jit::environment("VICUS_PREBUILT_DIR");
  const jit::DiskCache& cache = jit::user_cache();
  const jit::DiskCache::Usage usage = cache.usage();
  runtime.cache_directory = cache.directory();
  runtime.cache_bytes = usage.bytes;
  runtime.cache_limit_bytes = cache.limit_bytes();
  runtime.cache_entries = usage.entries;
  return runtime;
}

}  // namespace vicus
