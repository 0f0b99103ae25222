// Gradients of additional keys and values, one block per tile of kTileKv tokens, over all queries of the batch entry; see
// plain_keys.cuh. Constants of the prologue: also kMinBlocks,
// kSharedBytes.
#include "plain_keys.cuh"

namespace vicus::gpu {

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    plain_backward_additional(const __grid_constant__ PlainBackwardArgs plain) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  const ForwardArgs& args = plain.forward;
  const int token_tiles = geometry::ceil_div(args.additional, kKeys);
  const int tile = static_cast<int>(blockIdx.x) % token_tiles, rest = static_cast<int>(blockIdx.x) / token_tiles;
  const int batch = rest / args.heads_kv, cells = plain.cells / plain.batch;
  Block block;
  block.tokens = true;
  block.rows.kv_head = rest % args.heads_kv;
  block.rows.box.axis[0] = block.rows.box.axis[1] = {0, 1};
  block.rows.box.axis[2] = geometry::tile_span(tile, kKeys, args.additional);

  Cell entry;
  entry.batch = batch;
  const RowSources rows = {&args.additional_keys, &args.additional_values,
                           place_additional(args.additional_keys, entry),
                           place_additional(args.additional_values, entry)};
  WideSums grad_key, grad_value;
  for (bool careful = false;; careful = true) {
    grad_key.clear();
    grad_value.clear();
    for (int i = 0; i < cells; ++i) {
      block.cell = make_cell(args, batch * cells + i);
      __syncthreads();
      note_views(args, block, smem.views);
      __syncthreads();
      add_cell(plain, block, rows, smem, careful, grad_key, grad_value);
    }
    if (careful || !__syncthreads_or(!grad_key.all_finite() || !grad_value.all_finite())) break;
  }
  store_gradients(plain, block, plain.grad_additional_keys, place_additional(plain.grad_additional_keys, entry),
                  plain.grad_additional_values, place_additional(plain.grad_additional_values, entry), grad_key,
                  grad_value);
}

}  // namespace vicus::gpu
