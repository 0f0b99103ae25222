// The unfused operators on the GPU: one kernel each, see unfused.cuh and unfused_tiles.cuh.
#include "core/unfused.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "gpu/launch.h"
#include "gpu/spec.h"
#include "gpu/unfused_args.h"
#include "jit/device.h"
#include "vicus/geometry.h"

namespace vicus::gpu {
namespace {

// A launch of one kernel: `args`, filled but for the tensors, and what it is compiled for.
struct Operation {
  Operation(const Problem& p, Kernel kernel, std::initializer_list<ConstTensorView> tensors, DType bias_type)
      : spec(unfused_spec(p, kernel, aligned(tensors), bias_type)), tokens(p.queries()) {
    args.batch = static_cast<int>(p.batch);
    args.heads = static_cast<int>(p.heads);
    args.heads_kv = static_cast<int>(p.heads_kv);
    args.tokens = static_cast<int>(p.additional_tokens);
    for (int i = 0; i < p.rank(); ++i) args.len[3 - p.rank() + i] = static_cast<int>(p.layout[i]);
    require_countable("tokens", tokens);
    require_countable("heads of all batch entries", p.batch * p.heads);
  }

  // A warp per token and head, or per box of 16 tokens.
  void cover_rows(std::int64_t heads) {
    std::int64_t along = tokens;
    if (uses_tensor_cores(spec.kernel)) {
      along = 1;
      for (std::size_t a = 0; a < 3; ++a) {
        along *= std::min(spec.dilation[a], args.len[a]) *
                 geometry::ceil_div(geometry::class_len(args.len[a], spec.dilation[a], 0), spec.tile_q[a]);
      }
    }
    grid = {(along + spec.warps - 1) / spec.warps, std::min(args.batch * heads, kMostGridY)};
  }
  [[nodiscard]] bool empty() const { return grid.x == 0 || grid.y == 0; }

  Spec spec;
  std::int64_t tokens;
  UnfusedArgs args;
  Grid grid = 0;
};

Operation operation_of(const Problem& p, const ScoreRows& s) {
  Operation op(p, Kernel::unfused_scores, {s.rows, s.keys, s.additional}, s.rpb ? s.rpb.dtype() : DType::float32);
  op.args.rows = rows_of(s.rows, p.rank());
  op.args.keys = rows_of(s.keys, p.rank());
  op.args.additional = rows_of(s.additional, 1);
  op.args.scores = rows_of(s.scores, p.rank());
  op.args.bias = relative_bias_of(s.rpb, p.rank());
  op.args.zero_unused = s.unused == 0;
  op.cover_rows(p.heads);
  return op;
}

Operation operation_of(const Problem& p, const ScoreSums& s) {
  const bool of_queries = s.of == ScoreSums::queries, of_rpb = s.of == ScoreSums::rpb;
  const Kernel kernel = of_queries                             ? Kernel::unfused_to_queries
                        : s.of == ScoreSums::keys              ? Kernel::unfused_to_keys
                        : s.of == ScoreSums::additional_tokens ? Kernel::unfused_to_additional
                                                               : Kernel::unfused_to_bias;
  const ConstTensorView none, out = s.out;
  Operation op(p, kernel, {s.rows, of_queries ? s.additional : none, of_rpb ? none : out},
               of_rpb ? out.dtype() : DType::float32);
  op.args.scores = rows_of(s.scores, p.rank());
  (of_queries ? op.args.keys : op.args.rows) = rows_of(s.rows, of_rpb ? 0 : p.rank());
  switch (s.of) {
    case ScoreSums::queries:
      op.args.additional = rows_of(s.additional, 1);
      op.args.rows = rows_of(out, p.rank());
      op.cover_rows(p.heads);
      break;
    case ScoreSums::keys:
      op.args.keys = rows_of(out, p.rank());
      op.cover_rows(p.heads_kv);
      break;
    case ScoreSums::additional_tokens:
      op.args.additional = rows_of(out, 1);
      op.grid = p.batch * p.heads_kv * p.additional_tokens;
      break;
    case ScoreSums::rpb:
      op.args.bias = relative_bias_of(out, p.rank());
      op.grid = out.numel();
      break;
  }
  return op;
}

const void* written_by(const UnfusedStep& step) {
  const auto* rows = std::get_if<ScoreRows>(&step);
  return rows != nullptr ? rows->scores.data() : std::get<ScoreSums>(step).out.data();
}

void run(const Problem& p, std::span<const UnfusedStep> steps, void* stream) {
  std::vector<Operation> operations;
  Kernels kernels;
  const void* written = nullptr;
  for (const UnfusedStep& step : steps) {
    Operation op = std::visit([&](const auto& s) { return operation_of(p, s); }, step);
    if (op.empty()) continue;
    kernels.add(op.spec);
    operations.push_back(op);
    written = written_by(step);
  }
  if (operations.empty()) return;
  const jit::ContextGuard context(jit::device_of(written));
  Loaded loaded(kernels, stream);
  for (std::size_t i = 0; i < operations.size(); ++i) {
    loaded.launch(loaded.specs().begin()[i], operations[i].grid, operations[i].args);
  }
}

}  // namespace

const UnfusedEngine kUnfused = {run};

}  // namespace vicus::gpu
