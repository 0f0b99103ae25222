// The tests of src/jit run with a driver and a compiler of their own, and a cache that is removed afterwards. A process
// can open either library only once, so both are chosen here.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "fake_cuda.h"

namespace vicus::testing {

FakeCuda& fake_cuda() {
  static FakeCuda& state = [&]() -> FakeCuda& {
    void* const library = ::dlopen(VICUS_FAKE_CUDA, RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(::dlerror());
    return *reinterpret_cast<FakeCuda* (*)()>(::dlsym(library, "fake_cuda_state"))();
  }();
  return state;
}

}  // namespace vicus::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  std::string directory = (std::filesystem::temp_directory_path() / "vicus-jit-XXXXXX").string();
  if (::mkdtemp(directory.data()) == nullptr) return 1;
  ::setenv("VICUS_CUDA_DRIVER", VICUS_FAKE_CUDA, 1);
  ::setenv("VICUS_NVRTC", VICUS_FAKE_NVRTC, 1);
  ::setenv("VICUS_CACHE_DIR", (directory + "/cache").c_str(), 1);
  ::setenv("FAKE_NVRTC_LOG", (directory + "/compiled").c_str(), 1);
  const int status = RUN_ALL_TESTS();
  std::filesystem::remove_all(directory);
  return status;
}
