#include <omp.h>

#include <algorithm>

#include "cpu/threads.h"

namespace vicus::cpu {

int max_threads() noexcept { return omp_get_max_threads(); }

// Many more threads than processors would gain nothing, and OpenMP ends the process when it cannot make one: the workers
// of a larger team share threads.
void run_team(int team, void (*body)(int worker, void* context), void* context) {
#pragma omp parallel for num_threads(std::min(team, std::max(4 * omp_get_num_procs(), 16))) schedule(static)
  for (int worker = 0; worker < team; ++worker) body(worker, context);
}

}  // namespace vicus::cpu
