// The engine's threads are PyTorch's: torch.set_num_threads holds, and no second pool competes for the processors.
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <stdexcept>

#include "cpu/threads.h"

namespace vicus::cpu {
namespace {

struct Team {
  void (*body)(int worker, void* context);
  void* context;
};

}  // namespace

int max_threads() noexcept {
  std::uint32_t count = 1;
  return torch_get_num_threads(&count) == AOTI_TORCH_SUCCESS ? static_cast<int>(count) : 1;
}

void run_team(int team, void (*body)(int worker, void* context), void* context) {
  Team all{body, context};
  // One range may hold several workers, or all of them (inside another parallel region): they run one after another.
  const auto range = [](std::int64_t begin, std::int64_t end, void* data) {
    const Team& t = *static_cast<Team*>(data);
    for (std::int64_t worker = begin; worker < end; ++worker) t.body(static_cast<int>(worker), t.context);
  };
  if (torch_parallel_for(0, team, 1, range, &all) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("PyTorch's thread pool failed");
  }
}

}  // namespace vicus::cpu
