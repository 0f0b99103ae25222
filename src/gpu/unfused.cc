// The unfused operators on the GPU: one kernel each, see unfused.cuh.
#include "core/unfused.h"

#include <algorithm>
#include <initializer_list>

#include "gpu/launch.h"
#include "gpu/spec.h"
#include "gpu/unfused_args.h"
#include "jit/device.h"

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

  // A warp per token and head.
  void run_rows(std::int64_t heads, const void* written, void* stream) const {
    const std::int64_t rows = args.batch * heads;
    run({(tokens + spec.warps - 1) / spec.warps, std::min(rows, kMostGridY)}, written, stream);
  }
  void run(Grid grid, const void* written, void* stream) const {
    if (grid.x == 0 || grid.y == 0) return;
    const jit::ContextGuard context(jit::device_of(written));
    launch(spec, grid, stream, args);
  }

  Spec spec;
  std::int64_t tokens;
  UnfusedArgs args;
};

void write_scores(const Problem& p, const ScoreRows& s, void* stream) {
  Operation call(p, Kernel::unfused_scores, {s.rows, s.keys, s.additional}, s.rpb ? s.rpb.dtype() : DType::float32);
  call.args.rows = rows_of(s.rows, p.rank());
  call.args.keys = rows_of(s.keys, p.rank());
  call.args.additional = rows_of(s.additional, 1);
  call.args.scores = rows_of(s.scores, p.rank());
  call.args.bias = relative_bias_of(s.rpb, p.rank());
  call.args.zero_unused = s.unused == 0;
  call.run_rows(p.heads, s.scores.data(), stream);
}

void sum_to_queries(const Problem& p, const ConstTensorView& scores, const ConstTensorView& keys,
                    const ConstTensorView& additional, const TensorView& out, void* stream) {
  Operation call(p, Kernel::unfused_to_queries, {keys, additional, out}, DType::float32);
  call.args.scores = rows_of(scores, p.rank());
  call.args.keys = rows_of(keys, p.rank());
  call.args.additional = rows_of(additional, 1);
  call.args.rows = rows_of(out, p.rank());
  call.run_rows(p.heads, out.data(), stream);
}

void sum_to_keys(const Problem& p, const ConstTensorView& scores, const ConstTensorView& rows, const TensorView& out,
                 void* stream) {
  Operation call(p, Kernel::unfused_to_keys, {rows, out}, DType::float32);
  call.args.scores = rows_of(scores, p.rank());
  call.args.rows = rows_of(rows, p.rank());
  call.args.keys = rows_of(out, p.rank());
  call.run_rows(p.heads_kv, out.data(), stream);
}

void sum_to_additional(const Problem& p, const ConstTensorView& scores, const ConstTensorView& rows,
                       const TensorView& out, void* stream) {
  Operation call(p, Kernel::unfused_to_additional, {rows, out}, DType::float32);
  call.args.scores = rows_of(scores, p.rank());
  call.args.rows = rows_of(rows, p.rank());
  call.args.additional = rows_of(out, 1);
  call.run(p.batch * p.heads_kv * p.additional_tokens, out.data(), stream);
}

void sum_to_rpb(const Problem& p, const ConstTensorView& scores, const TensorView& out, void* stream) {
  Operation call(p, Kernel::unfused_to_bias, {}, out.dtype());
  call.args.scores = rows_of(scores, p.rank());
  call.args.bias = relative_bias_of(out, p.rank());
  call.run(out.numel(), out.data(), stream);
}

}  // namespace

const UnfusedEngine kUnfused = {write_scores, sum_to_queries, sum_to_keys, sum_to_additional, sum_to_rpb};

}  // namespace vicus::gpu
