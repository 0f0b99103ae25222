// Attention backward with the tensor cores of sm_90a, for 16-bit storage. backward.cuh has the formulas.
//
// A block owns rows and meets tiles of columns. Where rows are keys (kOfKeys) it sums dK and dV over the tiles of the queries
// that see them, of all heads of the group; where rows are queries it sums dQ over key tiles. Nothing is summed across
// blocks, so both are bit-exact, without scratch memory. With kKeyParts several blocks share out the heads of the group, and
// backward_convert_keys.cu sums their parts in one order. With kAddQueries there is no second kernel: blocks of keys also
// add what they know of dQ to scratch (sm90_query_sums.cuh), five products instead of seven. dK and dV of long head dims,
// which do not fit into registers together, have a kernel each (kApart): eight products.
//
// One warp loads boxes with the copy engine, kWarpgroups warpgroups own 64 rows each. S and dP of a tile (64 rows by
// kColumns columns) lie in registers as accumulators, and become P and dS where they are. Operand A of the sums is P or dS
// in registers; dS beside P is in shared memory. The sums of a tile's dS, or of P without it, run beside the next tile's S.
// With kAddQueries every tile has one before it, the first one zeros: two copies of a step instead of four.
//
// Small windows: several blocks of one warpgroup share a multiprocessor (kCrowd) and hide what each waits for. Threads of
// the math load for themselves, sums of a tile are done before the next one, P and dS stay in registers, warps step over
// columns that none of their rows sees, the kernel for queries makes delta, and sums leave by the copy engine.
//
// Values that are not finite: a pair that is not seen has weight zero, but zero times NaN is NaN. Rows whose sums are not
// finite are done again pair by pair (careful_gradients.cuh).
#include "sm90_gradient_math.cuh"

namespace vicus::gpu {

constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : 24, kMathRegisters = kWarpgroups == 3 ? 160 : 240;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    sm90_backward(const __grid_constant__ Sm90BackwardArgs args) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  const int thread = static_cast<int>(threadIdx.x);
  let_next_begin(args.backward.followed);
  const RowTile rows = row_tile(args);  // by each thread: to hear of it from one of them takes longer
  if (thread == 0) {
    init_barriers(smem);
    if constexpr (kAdds) init_query_sums(smem);
    load_rows(args, smem, rows);
    note_columns(args.backward, smem, rows);
  }
  note_seen(smem, rows);
  __syncthreads();
  const int role = kCrowd ? 1 : __shfl_sync(~0u, thread / kWarpgroupThreads, 0);
  if (role == 0) {
    registers_down<kLoadRegisters>();
    if (thread == 0) {
      Loader loader{args, smem};
      for (loader.begin(); loader.left > 0;) loader.next();
    }
    if (kOfKeys && thread >= 32 && thread < 32 + 32 * kStatisticsWarps) {
      await_kernels_before();
      load_statistics(args.backward, smem);
    }
    if (kAdds && thread == 96) add_query_sums(args, smem);
  } else {
    if constexpr (!kCrowd) registers_up<kMathRegisters>();
    Products products(smem, role - 1);
    Attend attend{args.backward, smem, products, {args, smem}, role - 1};
    if constexpr (kCrowd) {
      if (thread >= 32 * kFirstCopyWarp) await_kernels_before();  // which bring statistics
      attend.begin_loads();
    }
    await_kernels_before();
    if constexpr (kOfQueries) attend.note_statistics();
    mbarrier_wait(smem_address(&smem.rows_full), 0);
    attend.begin_rows();
    attend.run();
    attend.finish(args);
  }
}

}  // namespace vicus::gpu
