// How a problem will be computed: engine, tiles, counts of work, bytes. Every such number is computed here, once, and can
// be printed. Making a plan reads no tensor; one plan serves any number of calls and threads.
#ifndef VICUS_PLAN_H_
#define VICUS_PLAN_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "vicus/export.h"
#include "vicus/problem.h"

namespace vicus {

enum class Engine : std::uint8_t {
  automatic,  ///< the fastest that takes the problem
  reference,  ///< naive float64 loops; never fast, never wrong
  cpu,        ///< tiled, vectorised, threaded
  sm80,       ///< NVIDIA GPUs since Ampere: kernels compiled for the problem at run time; tensors are device memory
  sm90,       ///< sm80, with others for compute capability 9.0 (H100, H200): copy engine and warpgroup products
};

/// Whether the tensors of its calls are memory of a GPU.
[[nodiscard]] constexpr bool runs_on_gpu(Engine engine) noexcept {
  return engine == Engine::sm80 || engine == Engine::sm90;
}

/// "auto", "reference", "cpu", "sm80" or "sm90".
[[nodiscard]] VICUS_API std::string_view engine_name(Engine engine) noexcept;
/// The inverse. Throws InvalidArgument naming `argument`.
[[nodiscard]] VICUS_API Engine parse_engine(std::string_view name, const std::string& argument = "engine");

/// Empty when `engine` takes the (valid) problem, otherwise the reason in words. `automatic` stands for the engines of the
/// CPU: a problem does not say where its tensors are.
[[nodiscard]] VICUS_API std::string supports(const Problem& problem, Engine engine);

/// How much scratch memory a backward pass may trade for parallelism.
enum class MemoryPreference : std::uint8_t {
  balanced,      ///< key splits that bring the parallel tasks to at most 4096, counting those of batch and heads
  strict,        ///< the same to at most 1024
  unrestricted,  ///< up to 65535 key splits, whatever parallelism batch and heads give
};

/// What a backward pass is asked to do; `BackwardPlan::kv_splits_allowed` says what that comes to.
struct BackwardOptions {
  bool deterministic = false;  ///< gradients bit-identical from run to run: no key splits
  /// Lets an engine split the keys among tasks that add to the same query gradients, in no fixed order and with scratch
  /// memory for the sums.
  bool kv_parallelism = true;
  /// Bounds the number of key splits; `strict` also keeps blocks of engine sm90 from sharing out query heads that share keys.
  MemoryPreference memory = MemoryPreference::balanced;
  /// Key splits wanted per axis (trailing axes last) in place of the bound of `memory`; zeros leave it to the engine.
  std::array<int, 3> kv_splits{};
  friend bool operator==(const BackwardOptions&, const BackwardOptions&) = default;
};

/// What GPU a plan is for.
struct GpuTarget {
  int major = 0, minor = 0;  ///< compute capability; 0.0 means the device of the calling thread's context, or the first
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;
  friend bool operator==(const GpuTarget&, const GpuTarget&) = default;
};

struct PlanOptions {
  Engine engine = Engine::automatic;
  int threads = 0;               ///< CPU threads; 0 means as many as there are and the work is worth
  std::array<int, 3> tile_q{};   ///< query tile, trailing axes last; zeros let the planner search
  std::array<int, 3> tile_kv{};  ///< engine sm90: key tile, likewise; tiles that it does not have are not looked for
  int rows = 0;                  ///< query rows of a tile: 16, 32 or 64; 0 lets the planner search
  BackwardOptions backward = {};
  GpuTarget gpu = {};  ///< engines sm80 and sm90; where it is set, automatic means the faster of the two
  friend bool operator==(const PlanOptions&, const PlanOptions&) = default;
};

/// Work in (query, key) pairs, summed over batch and heads, additional tokens included.
struct Work {
  double mask_pairs = 0;  ///< pairs the mask lets through: the useful work
  double tile_pairs = 0;  ///< pairs computed by the tiles, padding included
  [[nodiscard]] double ratio() const noexcept { return mask_pairs > 0 ? tile_pairs / mask_pairs : 1.0; }
};

/// A query tile: a box of positions times heads of one key/value head, padded to `rows`.
struct QueryTile {
  int rows = 0;                 ///< 16, 32 or 64
  int heads = 1;                ///< query heads of one group side by side in a tile
  std::array<int, 3> extent{};  ///< positions per axis; product times heads <= rows
};

struct ForwardPlan {
  QueryTile tile;
  std::array<int, 3> stack{1, 1, 1};  ///< tiles per axis that share packed keys
  int stack_heads = 1;                ///< tiles along the heads of a group that share packed keys
  int roll_axis = -1;      ///< of three: packed keys are a ring of lines that moves along it, tile by tile; or -1
  int fold_axis = -1;      ///< of three: keys a window apart on it share scores where no query sees both; or -1
  int pack_keys = 0;       ///< most keys packed at once
  int chunk_keys = 0;      ///< most keys between two softmax updates
  std::int64_t tasks = 0;  ///< independent units of work
  std::size_t scratch_bytes = 0;  ///< per thread
  Work work;
};

struct BackwardPlan {
  BackwardOptions options;             ///< as asked for
  std::int64_t kv_splits_allowed = 1;  ///< most parts an engine may split the keys into: 1 means a bit-exact backward
  std::int64_t kv_splits = 1;          ///< parts they are split into; engines cpu and reference are bit-exact without
  QueryTile tile;
  std::array<int, 3> kv_block{};  ///< keys per axis whose gradients are summed together
  int chunk_keys = 0;
  std::array<int, 3> segment{};    ///< query tiles per axis whose gradients one task sums
  int segment_heads = 1;           ///< and tiles along the heads of a group
  std::int64_t segments = 0;       ///< tasks that sum query gradients, and key gradients where they hold all queries
  bool relay = false;              ///< segments hand the sums of a key block on to the next one that sees it
  int fold_axis = -1;              ///< as of the forward pass
  bool keep_queries = false;       ///< a segment keeps its tiles packed from one key block to the next
  std::int64_t border_blocks = 0;  ///< key blocks that no segment sums: tasks that do
  std::size_t scratch_bytes = 0;   ///< per thread
  Work work;                       ///< border blocks are computed twice: tile_pairs counts the extra 2 of 5 products
};

/// How a kernel of a GPU engine multiplies.
enum class GpuKernels : std::uint8_t {
  tensor_cores,  ///< bfloat16 and float16 with float32 sums, head dims up to 256
  warpgroups,    ///< the same by warpgroups out of boxes that the copy engine loads: engine sm90
  plain,  ///< exact multiply-adds in float32, float64 for float64: every dtype and alignment, head dims up to 512
};
/// "tensor cores", "warpgroups" or "plain".
[[nodiscard]] VICUS_API std::string_view kernels_name(GpuKernels kernels) noexcept;

/// A kernel of a GPU engine: one block of threads per query tile, or per key tile where it sums gradients of keys.
struct GpuKernelPlan {
  GpuKernels family = GpuKernels::tensor_cores;
  QueryTile tile;
  std::array<int, 3> kv_tile{};  ///< keys per axis that are loaded together
  /// Small windows: the box of queries that a warp owns, and the box of keys that it meets of each tile; of a kernel with a
  /// block per key tile, the box of queries that it meets, and that of keys that it owns. Zeros: warps share the tile's
  /// rows in their order and meet all of the others.
  std::array<int, 3> warp_tile{}, warp_keys{};
  int turns = 1;                  ///< tiles along the heads that a block computes one after the other
  int warps = 0, row_blocks = 0;  ///< a warp has 16 * row_blocks rows; of plain kernels 4 * thread_rows
  int thread_rows = 0;            ///< plain
  int depth = 0, wide = 0;        ///< plain: features of a first product and of a second one that are taken at a time
  int stages = 0;                 ///< tiles in flight
  int second_stages = 0;          ///< warpgroups, long head dims: likewise, of what the second product takes; else 0
  int chunk = 16, splits = 1;     ///< backward: keys (queries) that become weights together; warps that share rows
  bool hold = true;               ///< backward: the block's own rows stay in registers
  int stack_axis = 2;             ///< warpgroups: a query tile is cut along this axis into one box of each
  bool ping_pong = false;         ///< warpgroups: they take turns at the tensor cores
  /// Warpgroups: blocks that share out the keys of a query tile, or the query heads of a group that meet a key tile; a kernel
  /// merges what they leave in scratch memory.
  int key_parts = 1;
  /// Warpgroups: of tiles that differ in length (causal attention), those of so many heads take turns, the longest first.
  int heads_in_turns = 1;
  /// Warpgroups, gradients of keys: a block goes on with the next query head of the group before the next queries, which many
  /// blocks then meet at a time; otherwise one head after the other.
  bool heads_inside = true;
  int blocks_per_multiprocessor = 0;
  int shared_bytes = 0;
  std::int64_t blocks = 0;
  Work work;
};

/// Kernels for gradients.
struct GpuGradientPlan {
  /// Of engine sm90, those for queries of small windows may be kernels of engine sm80 (`family`), which are faster there.
  GpuKernelPlan queries, keys;
  GpuKernelPlan values;  ///< long head dims: of dV, where that of keys sums dK alone; otherwise no rows
  /// Query gradients are summed by the kernel for keys, in float32 scratch and no fixed order: faster, not bit-exact.
  /// Otherwise a kernel of their own computes them.
  bool add_queries = false;
  std::size_t scratch_bytes = 0;
};

struct GpuPlan {
  GpuTarget device;
  GpuKernelPlan forward;
  std::size_t forward_scratch_bytes = 0;  ///< engine sm90: for what parts of the keys give
  GpuGradientPlan backward;
  /// Engine sm90: of calls whose tensors the copy engine cannot address, where the above are kernels by boxes.
  GpuKernelPlan forward_unboxed;
  GpuGradientPlan backward_unboxed;
  std::string reason;  ///< why not all kernels use tensor cores; empty where they do
};

/// What was considered for the forward tile, best first.
struct TileCandidate {
  QueryTile tile;
  double work_ratio = 0;
  double cost = 0;               ///< estimated cycles of one core, relative measure
  std::array<int, 3> kv_tile{};  ///< engine sm90: the best tile of keys with it
  int key_parts = 1;             ///< engine sm90: as in GpuKernelPlan
};

struct Plan {
  Problem problem;  ///< validated
  Engine engine = Engine::cpu;
  std::string reason;  ///< why this engine
  int threads = 1;
  /// As in Work. With Dense::device this and every count below are those of the longest lengths: of as many sequences of
  /// max_queries and max_keys as there are tokens for, without padding among the keys.
  double mask_pairs = 0;
  double forward_flops = 0, backward_flops = 0;  ///< useful: 2 * (D + Dv) and 2 * (3 * D + 2 * Dv) per pair of the mask
  double forward_bytes = 0, backward_bytes = 0;  ///< each tensor moved once
  ForwardPlan forward;                           ///< engine cpu
  BackwardPlan backward;                         ///< engine cpu
  std::vector<TileCandidate> candidates;         ///< engines cpu and sm90, best first
  GpuPlan gpu;                                   ///< engines sm80 and sm90
};

/// Validates the problem and plans it. Throws InvalidArgument, or Unsupported with the text of `supports`.
[[nodiscard]] VICUS_API Plan choose_plan(const Problem& problem, const PlanOptions& options = {});

/// The plan for a person: several lines.
[[nodiscard]] VICUS_API std::string describe(const Plan& plan);

}  // namespace vicus

#endif  // VICUS_PLAN_H_
