#include "gpu/spec.h"

#include <algorithm>
#include <string>

#include "vicus/geometry.h"
#include "vicus/plan.h"

namespace vicus::gpu {
namespace {

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
  p += constant("int", "kTileHeads", s.tile_heads);
  p += constant("int", "kWarps", s.warps);
  p += constant("int", "kRowBlocks", s.row_blocks);
  p += constant("int", "kStages", s.stages);
  p += constant("int", "kMinBlocks", s.min_blocks);
  p += constant("int", "kSharedBytes", shared_bytes(s));
  p += constant("int", "kChunk", s.chunk);
  p += constant("int", "kSplits", s.splits);
  p += constant("bool", "kHold", s.hold);
  p += constant("bool", "kAddQueries", s.add_queries);
  p += constant("bool", "kAdditionalTile", s.kernel == Kernel::additional);
  p += "#include \"mma.cuh\"\nnamespace vicus::gpu { using Half = ";
  p += s.dtype == DType::float16 ? "F16" : "Bf16";
  return p + "; }\n";
}

using geometry::ceil_div;

// Elements from one row to the next in shared memory: 16 bytes of padding.
int row_step(int head_dim) { return padded(head_dim) + 8; }

// Rows of a query and value, or key and value, take `row` bytes.
int queries_bytes(const Spec& s, int row) {
  return s.rows() * row + s.stages * s.keys() * row + s.rows() * ceil_div(s.keys(), 64) * 8 + 64;
}

int keys_bytes(const Spec& s, int row) {
  const int keys = s.rows() / s.splits, step = s.chunk * s.splits;
  const int queries = ceil_div(s.tile_q[0] * s.tile_q[1] * s.tile_q[2] * s.tile_heads, step) * step;
  const int exchanged = s.splits > 1 ? 2 * (s.chunk / 16) * s.row_blocks * 4 * 32 : 1;
  constexpr int kWalkBytes = 208, kStatisticsBytes = 8;
  return keys * row + s.stages * queries * (row + kStatisticsBytes + 8 * ceil_div(keys, 64)) +
         2 * s.warps * 4 * (exchanged + 1) + (s.stages + 1) * kWalkBytes +
         (s.add_queries ? 2 * keys * (queries + 8) : 16) + 512;
}

}  // namespace

Spec spec_of(const Plan& plan, Kernel kernel, bool logsumexp, bool vectors, DType bias_type) {
  const Problem& p = plan.problem;
  Spec s;
  s.kernel = kernel;
  s.dtype = p.dtype;
  s.rank = p.rank();
  s.head_dim = static_cast<int>(p.head_dim);
  s.head_dim_v = static_cast<int>(p.head_dim_v);
  s.additional = p.additional_tokens > 0;
  s.logsumexp = logsumexp;
  if (const auto* mask = std::get_if<Neighborhood>(&p.mask)) {
    for (int i = 0; i < s.rank; ++i) {
      const auto a = static_cast<std::size_t>(3 - s.rank + i);
      s.window[a] = static_cast<int>(mask->kernel_size[i]);
      s.step[a] = static_cast<int>(mask->stride[i]);
      s.dilation[a] = static_cast<int>(mask->dilation[i]);
      s.causal[a] = mask->is_causal[i] != 0;
    }
  } else {
    const auto& dense = std::get<Dense>(p.mask);
    s.dense = true;
    s.band_left = static_cast<int>(dense.window_left);
    s.band_right = dense.causal != Causal::none ? 0 : static_cast<int>(dense.window_right);
    s.band_bottom = dense.causal != Causal::top_left;
    s.packed = !dense.cumulative_queries.empty();
    s.key_lengths = !dense.key_lengths.empty();
  }
  s.bias_kind = p.rpb ? BiasKind::relative : p.attn_bias ? BiasKind::additive : BiasKind::none;
  s.bias_type = bias_type;
  s.vectors = vectors;
  if (!s.tiled()) return s;
  s.pre_scale = kernel == Kernel::forward && (p.rpb || p.attn_bias || !(p.effective_scale() > 0));
  const GpuKernelPlan& f = kernel == Kernel::forward   ? plan.gpu.forward
                           : kernel == Kernel::queries ? plan.gpu.backward_queries
                                                       : plan.gpu.backward_keys;
  s.tile_q = f.tile.extent;
  s.tile_heads = f.tile.heads;
  s.tile_kv = f.kv_tile;
  s.warps = f.warps;
  s.row_blocks = f.row_blocks;
  s.stages = f.stages;
  s.min_blocks = f.blocks_per_multiprocessor;
  s.chunk = f.chunk;
  s.splits = f.splits;
  s.hold = f.hold;
  s.add_queries = kernel != Kernel::forward && plan.gpu.add_queries;
  return s;
}

int shared_bytes(const Spec& s) {
  const int query = row_step(s.head_dim), value = row_step(s.head_dim_v);
  if (s.kernel == Kernel::queries) return queries_bytes(s, 2 * (query + value));
  if (s.kernel == Kernel::keys || s.kernel == Kernel::additional) return keys_bytes(s, 2 * (query + value));
  if (s.kernel != Kernel::forward) return 0;
  const int tiles = s.stages * s.keys() * (query + value);
  constexpr int kSpanBytes = 8, kBoxBytes = 3 * kSpanBytes, kWalkBytes = 16;
  return 2 * (s.rows() * std::max(query, value) + tiles) + s.rows() * kBoxBytes + s.warps * 2 * kBoxBytes +
         s.stages * kWalkBytes;
}

jit::Source source_of(const Spec& spec) {
  constexpr std::array kFiles = {"forward.cu",       "backward_delta.cu",   "backward_queries.cu", "backward_keys.cu",
                                 "backward_keys.cu", "backward_convert.cu", "backward_bias.cu"};
  return {.file = kFiles[static_cast<std::size_t>(spec.kernel)], .prologue = prologue(spec)};
}

}  // namespace vicus::gpu
