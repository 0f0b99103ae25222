// Gradients of keys and values, one block per tile of keys; see plain_keys.cuh. Constants of the prologue: also kMinBlocks,
// kSharedBytes.
#include "plain_keys.cuh"

namespace vicus::gpu {

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    plain_backward_keys(const __grid_constant__ PlainBackwardArgs plain) {
  extern __shared__ __align__(128) unsigned char dynamic[];
  Smem& smem = *reinterpret_cast<Smem*>(dynamic);
  const ForwardArgs& args = plain.forward;
  const int number = static_cast<int>(blockIdx.x);
  const TileIndex index = tile_index<false>(plain.key_order, kUneven ? plain.key_order.nth(number) : number);
  Block block;
  block.rows.kv_head = index.head_block;
  block.cell = make_cell(args, index.cell);
  for (int a = 0; a < 3; ++a) {
    int keys = block.cell.grid.axis[a].keys;
    if (kKeyLengths && a == 2) keys = args.keys;  // keys that nobody sees have gradients, of 0
    block.rows.box.axis[a] = a < kFirstAxis ? Span{0, 1} : geometry::tile_span(index.at[a], kTileKv[a], keys);
  }
  if (block.rows.box.empty()) return;
  note_views(args, block, smem.views);

  const Cell& cell = block.cell;
  const RowSources rows = {&args.key, &args.value, place(args.key, cell, cell.first_key),
                           place(args.value, cell, cell.first_key)};
  WideSums grad_key, grad_value;
  for (bool careful = false;; careful = true) {
    grad_key.clear();
    grad_value.clear();
    __syncthreads();
    add_cell(plain, block, rows, smem, careful, grad_key, grad_value);
    if (careful || !__syncthreads_or(!grad_key.all_finite() || !grad_value.all_finite())) break;
  }
  store_gradients(plain, block, plain.grad_key, place(plain.grad_key, cell, cell.first_key), plain.grad_value,
                  place(plain.grad_value, cell, cell.first_key), grad_key, grad_value);
}

}  // namespace vicus::gpu
