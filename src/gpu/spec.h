// What a kernel is compiled for: every value that is a constant of its text. Compared on the hot path, turned into text
// only when a kernel has to be compiled.
#ifndef VICUS_GPU_SPEC_H_
#define VICUS_GPU_SPEC_H_

#include <array>
#include <compare>
#include <cstdint>

#include "jit/source.h"
#include "vicus/plan.h"

namespace vicus::gpu {

/// What is computed; spec.cc has the texts.
enum class Kernel : std::uint8_t {
  // Of half precision, with tensor cores; `additional` is the text of `keys`, of additional tokens.
  forward,
  delta,
  queries,
  keys,
  additional,
  convert,
  convert_keys,  // of dK and dV that several blocks have summed
  bias,
  // By boxes and warpgroups.
  sm90_forward,
  sm90_queries,  // one text for these three
  sm90_keys,
  sm90_values,  // dV of long head dims; that of keys then sums dK
  unfused_tile_scores,
  unfused_tile_to_queries,  // one text for these two
  unfused_tile_to_keys,
  // Plain: of any type and head dim.
  plain_forward,
  plain_delta,
  plain_queries,
  plain_keys,
  plain_additional,
  plain_bias,
  unfused_scores,
  unfused_to_queries,
  unfused_to_keys,
  unfused_to_additional,
  unfused_to_bias,
  merge_forward,
  merge_sums,
  merge_backward,
  merge_parts,  // of the keys, in engine sm90
  packed_rest,  // tokens after the last packed sequence
};
[[nodiscard]] constexpr bool uses_tensor_cores(Kernel kernel) { return kernel < Kernel::plain_forward; }

[[nodiscard]] constexpr bool loads_boxes(Kernel kernel) {
  return kernel >= Kernel::sm90_forward && kernel <= Kernel::sm90_values;
}
/// Gradients of keys by boxes: rows are keys, columns queries.
[[nodiscard]] constexpr bool has_boxes_of_keys(Kernel kernel) {
  return kernel == Kernel::sm90_keys || kernel == Kernel::sm90_values;
}

/// Likewise, by tensor cores.
[[nodiscard]] constexpr bool owns_keys(Kernel kernel) { return kernel == Kernel::keys || kernel == Kernel::additional; }

/// Text that waits for the kernels before it: such a kernel may be launched while those still run.
[[nodiscard]] constexpr bool waits(Kernel kernel) {
  switch (kernel) {
    case Kernel::queries:
    case Kernel::keys:
    case Kernel::additional:
    case Kernel::convert:
    case Kernel::convert_keys:
    case Kernel::sm90_queries:
    case Kernel::sm90_keys:
    case Kernel::sm90_values:
    case Kernel::merge_parts:
      return true;
    default:
      return false;
  }
}

enum class BiasKind : std::uint8_t { none, relative, additive };

struct Spec {
  Kernel kernel = Kernel::forward;
  DType dtype = DType::bfloat16;
  // The problem.
  int rank = 1;
  int head_dim = 0, head_dim_v = 0;
  bool dense = false;
  std::array<int, 3> window{1, 1, 1}, step{1, 1, 1}, dilation{1, 1, 1};  // neighborhood, trailing axes last
  std::array<bool, 3> causal{};
  int band_left = -1, band_right = -1;  // dense; -1: open
  bool band_bottom = false;             // dense: counted from the last key
  bool packed = false, key_lengths = false;
  bool additional = false, logsumexp = false;
  bool pre_scale = false;  // logits are scaled one by one: biased, or by a scale that is not positive
  BiasKind bias_kind = BiasKind::none;
  DType bias_type = DType::float32;
  bool vectors = false;  // rows start at multiples of 16 bytes
  // The tiles.
  std::array<int, 3> tile_q{1, 1, 1}, tile_kv{1, 1, 1};
  std::array<int, 3> warp_q{1, 1, 1}, warp_kv{1, 1, 1};  // boxes of them that belong to a warp; else the whole tile
  int turns = 1;  // tiles along the heads that a block computes one after the other
  int tile_heads = 1;
  int warps = 4, row_blocks = 1, stages = 2, min_blocks = 1;
  // Backward: columns that become weights together, warps that share rows, resident operands in registers, and whether
  // query gradients are added to sums on the way.
  int chunk = 16, splits = 1;
  bool hold = true, add_queries = false;
  bool careful_sums = false;  // their conversion: rows that are not finite are done again
  // Plain: a quarter of the rows of a warp, features that a first product takes at a time, and those of a second one.
  int thread_rows = 0, depth = 0, wide = 0;
  int lanes = 0;          // merge: of a row
  int second_stages = 0;  // gradients by boxes: GpuKernelPlan
  // Boxes: the axis along which warpgroups' boxes lie side by side, whether warpgroups take turns, and whether several
  // blocks share out the keys of a tile of queries, or the query heads of a tile of keys. GpuKernelPlan::heads_inside.
  int stack_axis = 2;
  bool ping_pong = false, key_parts = false, heads_inside = true;

  friend auto operator<=>(const Spec&, const Spec&) = default;

  /// By boxes, several blocks on a multiprocessor: each loads for itself.
  [[nodiscard]] bool crowd() const { return loads_boxes(kernel) && min_blocks > 1; }
  /// With those that load boxes.
  [[nodiscard]] int threads() const { return 32 * warps + (loads_boxes(kernel) && !crowd() ? 128 : 0); }
  [[nodiscard]] int rows() const { return (thread_rows > 0 ? 4 * thread_rows : 16 * row_blocks) * warps; }
  [[nodiscard]] int queries() const { return tile_q[0] * tile_q[1] * tile_q[2] * tile_heads; }
  [[nodiscard]] int keys() const { return tile_kv[0] * tile_kv[1] * tile_kv[2]; }
  /// Of dK and dV, dK.
  [[nodiscard]] bool sums_keys_alone() const { return kernel == Kernel::sm90_keys && second_stages > 0; }
  /// Kernels for queries whose rows are short of work make delta, too.
  [[nodiscard]] bool makes_statistics() const {
    return kernel == Kernel::sm90_queries ? crowd() : kernel == Kernel::queries && meets_parts();
  }
  /// Tiles differ in length: kUneven of sm90_boxes.cuh.
  [[nodiscard]] bool uneven() const {
    return dense ? band_right >= 0 && band_left < 0 : causal[0] || causal[1] || causal[2];
  }
  [[nodiscard]] bool meets_parts() const { return warp_q != tile_q || warp_kv != tile_kv; }
};

/// Features that the products of tensor cores take for a head dim.
[[nodiscard]] constexpr int padded(std::int64_t head_dim) { return static_cast<int>((head_dim + 15) / 16 * 16); }

/// Bytes of the type that the plain kernels compute in.
[[nodiscard]] constexpr int accumulator_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

/// `vectors`: all rows start at multiples of 16 bytes; `bias_type`: of the bias, if there is one.
[[nodiscard]] Spec spec_of(const Plan& plan, Kernel kernel, bool logsumexp, bool vectors, DType bias_type);

/// The plan for the forward pass, or for gradients, whose kernels need no boxes.
[[nodiscard]] const GpuKernelPlan& portable_forward(const GpuPlan& plan);
[[nodiscard]] const GpuGradientPlan& portable_gradients(const GpuPlan& plan);

/// A kernel of the unfused operators, with tensor cores where it can have them; `kernel` is the one without, `bias_type` of
/// the bias it reads or writes.
[[nodiscard]] Spec unfused_spec(const Problem& problem, Kernel kernel, bool vectors, DType bias_type);
/// A kernel that merges rows of `width` features.
[[nodiscard]] Spec merge_spec(Kernel kernel, DType dtype, int width, bool vectors);

/// The tiles of a kernel, in `spec`.
void set_tiles(Spec& spec, const GpuKernelPlan& kernel);

/// Dynamic shared memory of the kernel; its text asserts that this is enough.
[[nodiscard]] int shared_bytes(const Spec& spec);
[[nodiscard]] jit::Source source_of(const Spec& spec);

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SPEC_H_
