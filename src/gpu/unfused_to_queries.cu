// Sums of key rows by the scores of a query; see unfused_sums.cuh.
#include "unfused_sums.cuh"

namespace vicus::gpu {

extern "C" __global__ void __launch_bounds__(kThreads, 1) unfused_to_queries(const __grid_constant__ UnfusedArgs args) {
  for_each_row(args, args.heads, [&](int batch, int head, const Token& at) { sum_to_query(args, batch, head, at); });
}

}  // namespace vicus::gpu
