#include "gpu/spec.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "vicus/geometry.h"
#include "vicus/plan.h"

namespace vicus::gpu {
namespace {

constexpr int kWarpsWithoutTiles = 8;  // of kernels whose blocks have no tile

std::string text(bool value) { return value ? "true" : "false"; }
std::string text(int value) { return std::to_string(value); }

template <class T>
std::string text(const std::array<T, 3>& values) {
  std::string list = "{";
  for (const T value : values) list.append(list.size() > 1 ? ", " : "").append(text(value));
  return list.append("}");
}

template <class T>
std::string constant(const char* type, const char* name, const T& value, const char* extent = "") {
  std::string line = "[[maybe_unused]] constexpr ";
  return line.append(type).append(" ").append(name).append(extent).append(" = ").append(text(value)).append(";\n");
}

// A function around one warpgroup product of 64 rows, `columns` columns and 16 features.
struct Product {
  const char* name;
  int columns;
  bool registers = false;      // a is in registers, not in shared memory
  bool b_by_features = false;  // b lies by rows of features, not of columns
  bool a_by_features = false;  // likewise a, in shared memory
  bool begins = false;         // d = a . b; otherwise d = d * add + a . b
};

std::string text(const Product& f, DType dtype) {
  const int count = f.columns / 2;  // registers of d, operands of the instruction before all others
  std::string d, outputs;
  for (int i = 0; i < count; ++i) {
    d.append(i == 0 ? "%" : ", %").append(text(i));
    outputs.append(i == 0 ? "\"" : ", \"").append(f.begins ? "=" : "+").append("f\"(d[").append(text(i)).append("])");
  }
  int next = count;
  const auto operand = [&] { return std::string("%").append(text(next++)); };
  std::string a = f.registers ? "{" : "";
  a.append(operand());
  for (int i = 1; f.registers && i < 4; ++i) a.append(", ").append(operand());
  if (f.registers) a.append("}");
  const std::string b = operand(), add = f.begins ? "0" : operand(), type = dtype == DType::float16 ? ".f16" : ".bf16";
  std::string code = "namespace vicus::gpu {\n__device__ __forceinline__ void ";
  code.append(f.name).append("(float (&d)[").append(text(count)).append("], ");
  code.append(f.registers ? "u32 a0, u32 a1, u32 a2, u32 a3" : "u64 a").append(", u64 b");
  code.append(f.begins ? ") {\n" : ", int add) {\n");
  code.append("  asm volatile(\"{\\n.reg .pred p;\\nsetp.ne.b32 p, ").append(add).append(", 0;\\n");
  code.append("wgmma.mma_async.sync.aligned.m64n").append(text(f.columns)).append("k16.f32").append(type).append(type);
  code.append(" {").append(d).append("}, ").append(a).append(", ").append(b).append(", p, 1, 1, ");
  if (!f.registers) code.append(f.a_by_features ? "1, " : "0, ");
  code.append(f.b_by_features ? "1" : "0").append(";\\n}\" : ").append(outputs).append(" : ");
  code.append(f.registers ? "\"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3)" : "\"l\"(a)").append(", \"l\"(b)");
  return code.append(f.begins ? ");\n}\n}\n" : ", \"r\"(add));\n}\n}\n");
}

std::string boxes_prologue(const Spec& s) {
  std::string p = constant("int", "kWarpgroups", s.warps / 4) + constant("int", "kStackAxis", s.stack_axis) +
                  constant("bool", "kPingPong", s.ping_pong) + constant("bool", "kKeyParts", s.key_parts) +
                  "constexpr long long kPatience = 0;\n" +
                  text(Product{.name = "wgmma_scores", .columns = s.keys()}, s.dtype);
  if (s.kernel == Kernel::sm90_forward) {
    return p + text(Product{.name = "wgmma_values", .columns = s.head_dim_v, .registers = true, .b_by_features = true},
                    s.dtype);
  }
  // sm90_backward.cu, of rows that are keys and of rows that are queries
  p += constant("bool", "kOfKeys", has_boxes_of_keys(s.kernel));
  p += constant("bool", "kHeadsInside", s.heads_inside);
  p += constant("bool", "kSumsFirst", s.kernel != Kernel::sm90_values);
  p += constant("bool", "kSumsSecond", has_boxes_of_keys(s.kernel) && !s.sums_keys_alone());
  p += constant("int", "kSecondStages", s.second_stages);
  constexpr int kSumWidth = 64;  // features of dQ that a warpgroup sums
  for (const Product& f : {
           Product{.name = "wgmma_scores_begin", .columns = s.keys(), .begins = true},
           Product{.name = "wgmma_first", .columns = s.head_dim, .b_by_features = true},
           Product{.name = "wgmma_first", .columns = s.head_dim, .registers = true, .b_by_features = true},
           Product{.name = "wgmma_second", .columns = s.head_dim_v, .registers = true, .b_by_features = true},
           Product{.name = "wgmma_queries", .columns = kSumWidth, .b_by_features = true, .a_by_features = true},
           Product{.name = "wgmma_queries_begin",
                   .columns = kSumWidth,
                   .b_by_features = true,
                   .a_by_features = true,
                   .begins = true},
       }) {
    p += text(f, s.dtype);
  }
  return p;
}

std::string prologue(const Spec& s) {
  std::string p;
  p += constant("int", "kRank", s.rank);
  p += constant("int", "kHeadDim", s.head_dim);
  p += constant("int", "kHeadDimV", s.head_dim_v);
  p += constant("bool", "kDense", s.dense);
  p += constant("int", "kWindow", s.window, "[3]");
  p += constant("int", "kStep", s.step, "[3]");
  p += constant("int", "kDilation", s.dilation, "[3]");
  p += constant("bool", "kCausal", s.causal, "[3]");
  p += constant("int", "kBandLeft", s.band_left);
  p += constant("int", "kBandRight", s.band_right);
  p += constant("bool", "kBandBottom", s.band_bottom);
  p += constant("bool", "kPacked", s.packed);
  p += constant("bool", "kKeyLengths", s.key_lengths);
  p += constant("bool", "kAdditional", s.additional);
  p += constant("bool", "kLogsumexp", s.logsumexp);
  p += constant("bool", "kPreScale", s.pre_scale);
  p += constant("int", "kBiasKind", static_cast<int>(s.bias_kind));
  p += constant("int", "kBiasType", static_cast<int>(s.bias_type));
  p += constant("bool", "kVectors", s.vectors);
  p += constant("int", "kTileQ", s.tile_q, "[3]");
  p += constant("int", "kTileKv", s.tile_kv, "[3]");
  p += constant("int", "kWarpQ", s.warp_q, "[3]");
  p += constant("int", "kWarpKv", s.warp_kv, "[3]");
  p += constant("int", "kTileHeads", s.tile_heads);
  p += constant("int", "kTurns", s.turns);
  p += constant("int", "kWarps", s.warps);
  p += constant("int", "kRowBlocks", s.row_blocks);
  p += constant("int", "kStages", s.stages);
  p += constant("int", "kMinBlocks", s.min_blocks);
  p += constant("int", "kSharedBytes", shared_bytes(s));
  p += constant("int", "kChunk", s.chunk);
  p += constant("int", "kSplits", s.splits);
  p += constant("bool", "kHold", s.hold);
  p += constant("bool", "kAddQueries", s.add_queries);
  p += constant("bool", "kCarefulSums", s.careful_sums);
  p += constant("bool", "kAdditionalTile", s.kernel == Kernel::additional);
  p += constant("bool", "kOwnsKeys", owns_keys(s.kernel));
  p += constant("bool", "kGathers", s.meets_parts());
  p += constant("int", "kElement", static_cast<int>(s.dtype));
  p += constant("int", "kThreadRows", s.thread_rows);
  p += constant("int", "kDepth", s.depth);
  p += constant("int", "kWide", s.wide);
  p += constant("int", "kLanes", s.lanes);
  if (!uses_tensor_cores(s.kernel)) return p;
  p += "#include \"mma.cuh\"\nnamespace vicus::gpu { using Half = ";
  p += s.dtype == DType::float16 ? "F16" : "Bf16";
  p += "; }\n";
  if (loads_boxes(s.kernel)) return p + boxes_prologue(s);
  if (s.kernel == Kernel::unfused_tile_to_queries || s.kernel == Kernel::unfused_tile_to_keys) {
    p += constant("bool", "kRowsAreKeys", s.kernel == Kernel::unfused_tile_to_keys);
  }
  return p;
}

// Windows, trailing axes last.
void set_windows(Spec& s, const Neighborhood& mask, int rank) {
  s.rank = rank;
  for (int i = 0; i < rank; ++i) {
    const auto a = static_cast<std::size_t>(3 - rank + i);
    s.window[a] = static_cast<int>(mask.kernel_size[i]);
    s.step[a] = static_cast<int>(mask.stride[i]);
    s.dilation[a] = static_cast<int>(mask.dilation[i]);
    s.causal[a] = mask.is_causal[i] != 0;
  }
}

// Tiles of a kernel; null where it has none.
const GpuKernelPlan* tiles_of(const GpuPlan& plan, Kernel kernel) {
  switch (kernel) {
    case Kernel::sm90_forward:
      return &plan.forward;
    case Kernel::sm90_queries:
      return &plan.backward.queries;
    case Kernel::sm90_keys:
      return &plan.backward.keys;
    case Kernel::sm90_values:
      return &plan.backward.values;
    case Kernel::forward:
    case Kernel::plain_forward:
      return &portable_forward(plan);
    case Kernel::queries:
    case Kernel::plain_queries:
      return &portable_gradients(plan).queries;
    case Kernel::keys:
    case Kernel::additional:
    case Kernel::plain_keys:
    case Kernel::plain_additional:
      return &portable_gradients(plan).keys;
    default:
      return nullptr;
  }
}

}  // namespace

void set_tiles(Spec& s, const GpuKernelPlan& k) {
  s.tile_q = k.tile.extent;
  s.tile_heads = k.tile.heads;
  s.tile_kv = k.kv_tile;
  if (has_boxes_of_keys(s.kernel)) std::swap(s.tile_q, s.tile_kv);  // rows and columns
  const bool parts = k.warp_tile[0] > 0;
  s.warp_q = parts ? k.warp_tile : s.tile_q;
  s.warp_kv = parts ? k.warp_keys : s.tile_kv;
  s.turns = k.turns;
  s.warps = k.warps;
  s.row_blocks = k.row_blocks;
  s.stages = k.stages;
  s.second_stages = k.second_stages;
  s.min_blocks = k.blocks_per_multiprocessor;
  s.chunk = k.chunk;
  s.splits = k.splits;
  s.hold = k.hold;
  s.thread_rows = k.thread_rows;
  s.depth = k.depth;
  s.wide = k.wide;
  s.stack_axis = k.stack_axis;
  s.ping_pong = k.ping_pong;
  s.key_parts = k.key_parts > 1;
  s.heads_inside = k.heads_inside;
}

const GpuKernelPlan& portable_forward(const GpuPlan& plan) {
  return plan.forward.family == GpuKernels::warpgroups ? plan.forward_unboxed : plan.forward;
}

const GpuGradientPlan& portable_gradients(const GpuPlan& plan) {
  return plan.backward.keys.family == GpuKernels::warpgroups ? plan.backward_unboxed : plan.backward;
}

Spec spec_of(const Plan& plan, Kernel kernel, bool logsumexp, bool vectors, DType bias_type) {
  const Problem& p = plan.problem;
  Spec s;
  s.kernel = kernel;
  s.warps = kWarpsWithoutTiles;
  if (kernel == Kernel::packed_rest) return s;  // one for all problems
  s.dtype = p.dtype;
  s.rank = p.rank();
  s.head_dim = static_cast<int>(p.head_dim);
  s.head_dim_v = static_cast<int>(p.head_dim_v);
  s.additional = p.additional_tokens > 0;
  s.logsumexp = logsumexp;
  if (const auto* mask = std::get_if<Neighborhood>(&p.mask)) {
    set_windows(s, *mask, s.rank);
  } else {
    const auto& dense = std::get<Dense>(p.mask);
    s.dense = true;
    s.band_left = static_cast<int>(dense.window_left);
    s.band_right = dense.causal != Causal::none ? 0 : static_cast<int>(dense.window_right);
    s.band_bottom = dense.causal != Causal::top_left;
    s.packed = dense.packed();
    s.key_lengths = dense.padded();
  }
  s.bias_kind = p.rpb ? BiasKind::relative : p.attn_bias ? BiasKind::additive : BiasKind::none;
  s.bias_type = bias_type;
  s.vectors = vectors;
  const GpuKernelPlan* const tiled = tiles_of(plan.gpu, kernel);
  if (tiled == nullptr) return s;
  set_tiles(s, *tiled);
  s.pre_scale = kernel == Kernel::forward && (p.rpb || p.attn_bias || !(p.effective_scale() > 0));
  s.add_queries = uses_tensor_cores(kernel) && kernel != Kernel::forward && kernel != Kernel::sm90_forward &&
                  (loads_boxes(kernel) ? plan.gpu.backward : portable_gradients(plan.gpu)).add_queries;
  // Additional tokens have a kernel of their own.
  if (has_boxes_of_keys(kernel)) s.additional = false;
  return s;
}

namespace {

// The box of 16 positions whose windows are the least work together.
std::array<int, 3> unfused_box(const Spec& s, const Problem& p) {
  constexpr int kRows = 16;
  std::array<int, 3> best{1, 1, kRows};
  double least = std::numeric_limits<double>::infinity();
  for (int i = 1; i <= (s.rank > 2 ? kRows : 1); i *= 2) {
    for (int j = 1; j <= (s.rank > 1 ? kRows / i : 1); j *= 2) {
      const std::array<int, 3> box{i, j, kRows / (i * j)};
      double work = 1;
      for (int n = 0; n < s.rank; ++n) {
        const auto a = static_cast<std::size_t>(3 - s.rank + n);
        const int len = geometry::class_len(static_cast<int>(p.layout[n]), s.dilation[a], 0);
        work *= geometry::ceil_div(len, box[a]) * static_cast<double>(std::min(s.window[a] + box[a] - 1, len));
      }
      if (work < least) least = work, best = box;
    }
  }
  return best;
}

}  // namespace

Spec unfused_spec(const Problem& p, Kernel kernel, bool vectors, DType bias_type) {
  Spec s;
  s.kernel = kernel;
  s.dtype = p.dtype;
  s.head_dim = s.head_dim_v = static_cast<int>(p.head_dim);
  set_windows(s, std::get<Neighborhood>(p.mask), p.rank());
  s.vectors = vectors;
  s.bias_type = bias_type;
  s.warps = kWarpsWithoutTiles;
  if (!vectors || dtype_size(p.dtype) != 2) return s;
  if (kernel == Kernel::unfused_scores) s.kernel = Kernel::unfused_tile_scores;
  if (kernel == Kernel::unfused_to_queries) s.kernel = Kernel::unfused_tile_to_queries;
  if (kernel == Kernel::unfused_to_keys) s.kernel = Kernel::unfused_tile_to_keys;
  if (!uses_tensor_cores(s.kernel)) return s;
  constexpr int kUnfusedWarps = 4, kMostHeld = 64;  // registers
  s.warps = kUnfusedWarps;
  s.hold = s.head_dim <= kMostHeld;
  const bool causal = s.causal[0] || s.causal[1] || s.causal[2];
  s.min_blocks = 4 - (s.rank > 2 ? 1 : 0) - (s.head_dim > kMostHeld ? 1 : 0) - (causal ? 1 : 0);
  s.tile_q = unfused_box(s, p);
  return s;
}

Spec merge_spec(Kernel kernel, DType dtype, int width, bool vectors) {
  Spec s;
  s.kernel = kernel;
  s.dtype = dtype;
  s.head_dim = s.head_dim_v = width;
  s.vectors = vectors;
  s.warps = kWarpsWithoutTiles;
  const int piece = vectors ? 16 / static_cast<int>(dtype_size(dtype)) : 1;
  for (s.lanes = 1; s.lanes < 32 && s.lanes * piece < width;) s.lanes *= 2;
  return s;
}

jit::Source source_of(const Spec& spec) {
  constexpr std::array kFiles = {"forward.cu",
                                 "backward_delta.cu",
                                 "backward_queries.cu",
                                 "backward_keys.cu",
                                 "backward_keys.cu",
                                 "backward_convert.cu",
                                 "backward_convert_keys.cu",
                                 "backward_bias.cu",
                                 "sm90_forward.cu",
                                 "sm90_backward.cu",
                                 "sm90_backward.cu",
                                 "sm90_backward.cu",
                                 "unfused_tile_scores.cu",
                                 "unfused_tile_sums.cu",
                                 "unfused_tile_sums.cu",
                                 "plain_forward.cu",
                                 "plain_delta.cu",
                                 "plain_backward_queries.cu",
                                 "plain_backward_keys.cu",
                                 "plain_backward_additional.cu",
                                 "plain_backward_bias.cu",
                                 "unfused_scores.cu",
                                 "unfused_to_queries.cu",
                                 "unfused_to_keys.cu",
                                 "unfused_to_additional.cu",
                                 "unfused_to_bias.cu",
                                 "merge_forward.cu",
                                 "merge_sums.cu",
                                 "merge_backward.cu",
                                 "merge_parts.cu",
                                 "packed_rest.cu"};
  return {.file = kFiles[static_cast<std::size_t>(spec.kernel)],
          .prologue = prologue(spec),
          .arch_specific = loads_boxes(spec.kernel)};
}

}  // namespace vicus::gpu
