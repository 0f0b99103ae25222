// Sums of query rows by the scores that a key has with them; see unfused_sums.cuh.
#include "unfused_sums.cuh"

namespace vicus::gpu {

extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_keys(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads_kv, [&](int batch, int head, const Token& at) { sum_to_key(args, batch, head, at); });
}

}  // namespace vicus::gpu
