// The operators' kernels: PyTorch's tensors in, PyTorch's tensors out, the core's calls in between. Mechanical on
// purpose: schemas, shapes under tracing and autograd are in python/vicus, every rule on arguments is in the core.
//
// Only PyTorch's stable ABI is used, so one binary serves every PyTorch since 2.10 and every Python.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gpu/ahead.h"
#include "gpu/report.h"
#include "jit/ahead.h"
#include "jit/nvrtc.h"
#include "torch/lengths.h"
#include "torch/plans.h"
#include "torch/tensors.h"
#include "vicus/attention.h"
#include "vicus/error.h"
#include "vicus/info.h"
#include "vicus/merge.h"
#include "vicus/unfused.h"

namespace vicus::binding {
namespace {

using Tensors = std::vector<Tensor>;

bool wants(std::int64_t wanted, int bit) { return ((wanted >> bit) & 1) != 0; }

/// Of operators without a plan.
Engine engine_of(const Place& place) { return place.cuda ? Engine::sm80 : Engine::cpu; }

Neighborhood neighborhood_of(const Ints& kernel_size, const Ints& stride, const Ints& dilation, const Ints& is_causal) {
  return {AxisValues(std::span(kernel_size)), AxisValues(std::span(stride)), AxisValues(std::span(dilation)),
          AxisValues(std::span(is_causal))};
}

Dense dense_of(std::int64_t causal, std::int64_t window_left, std::int64_t window_right) {
  return {.causal = static_cast<Causal>(causal), .window_left = window_left, .window_right = window_right};
}

std::tuple<Tensor, Tensor> run_forward(const Place& place, const Problem& problem, const AttentionInputs& inputs,
                                       const Ints& options) {
  bool made = false;
  const auto plan = plan_for(problem, plan_options(place, options, Pass::forward), &made);
  if (made && place.cuda) {  // with a logsumexp, gradients are likely to follow
    gpu::compile_gradients_ahead(*plan, inputs.rpb         ? inputs.rpb.dtype()
                                        : inputs.attn_bias ? inputs.attn_bias.dtype()
                                                           : DType::float32);
  }
  Tensor output = empty(place, plan->problem.output_shape(), plan->problem.dtype);
  Tensor logsumexp = empty(place, plan->problem.logsumexp_shape(), logsumexp_dtype(plan->problem.dtype));
  Queue queue(place);
  forward(*plan, inputs, written(output), written(logsumexp), queue.stream());
  return {std::move(output), std::move(logsumexp)};
}

// The forward pass alone, with every default.
Tensor run_inference(const Place& place, const Problem& problem, const AttentionInputs& inputs) {
  const auto plan = plan_for(problem, plan_options(place, {}, Pass::forward));
  Tensor output = empty(place, plan->problem.output_shape(), plan->problem.dtype);
  Queue queue(place);
  forward(*plan, inputs, written(output), {}, queue.stream());
  return output;
}

// Gradients in the order of `AttentionInputs`, as many as the operator's schema says.
Tensors run_backward(const Place& place, const Problem& problem, const AttentionInputs& inputs,
                     const AttentionGradInputs& grad_inputs, const Ints& options, std::int64_t wanted, int count) {
  const auto plan = plan_for(problem, plan_options(place, options, Pass::backward));
  const ConstTensorView* const of[] = {
      &inputs.query, &inputs.key, &inputs.value, &inputs.additional_keys, &inputs.additional_values, &inputs.rpb};
  AttentionGradients views;
  TensorView* const into[] = {&views.query, &views.key, &views.value, &views.additional_keys, &views.additional_values,
                              &views.rpb};
  Tensors result;
  for (int i = 0; i < count; ++i) {
    Gradient gradient = gradient_of(place, *of[i], wants(wanted, i), problem.dtype);
    *into[i] = gradient.view;
    result.push_back(std::move(gradient.tensor));
  }
  Queue queue(place);
  backward(*plan, inputs, grad_inputs, views, queue.stream());
  return result;
}

AttentionInputs inputs_of(Rows& rows, const Tensor& query, const Tensor& key, const Tensor& value,
                          const MaybeTensor& additional_keys, const MaybeTensor& additional_values) {
  return {.query = rows("query", query),
          .key = rows("key", key),
          .value = rows("value", value),
          .additional_keys = rows("additional_keys", additional_keys),
          .additional_values = rows("additional_values", additional_values)};
}

AttentionGradInputs grad_inputs_of(Rows& rows, const Tensor& grad_output, const MaybeTensor& grad_logsumexp,
                                   const Tensor& output, const Tensor& logsumexp) {
  return {.output = rows("output", output),
          .logsumexp = view("logsumexp", logsumexp),
          .grad_output = rows("grad_output", grad_output),
          .grad_logsumexp = view("grad_logsumexp", grad_logsumexp)};
}

// --- Fused operators ------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> neighborhood(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const MaybeTensor& additional_keys, const MaybeTensor& additional_values,
                                        const MaybeTensor& rpb, const Ints& kernel_size, const Ints& stride,
                                        const Ints& dilation, const Ints& is_causal, double scale,
                                        const Ints& options) {
  Rows rows;
  AttentionInputs inputs = inputs_of(rows, query, key, value, additional_keys, additional_values);
  inputs.rpb = view("rpb", rpb);
  return run_forward(place_of(query),
                     neighborhood_problem(inputs.query, inputs.key, inputs.value,
                                          neighborhood_of(kernel_size, stride, dilation, is_causal), scale,
                                          inputs.additional_keys, inputs.rpb),
                     inputs, options);
}

// `mask` holds kernel_size, stride, dilation and is_causal, one value per axis each.
Tensor neighborhood_inference(const Tensor& query, const Tensor& key, const Tensor& value, const Ints& mask,
                              double scale) {
  const std::size_t rank = mask.size() / 4;
  const std::span<const std::int64_t> all(mask);
  Rows rows;
  const AttentionInputs inputs = inputs_of(rows, query, key, value, {}, {});
  const Neighborhood windows = {AxisValues(all.subspan(0, rank)), AxisValues(all.subspan(rank, rank)),
                                AxisValues(all.subspan(2 * rank, rank)), AxisValues(all.subspan(3 * rank, rank))};
  return run_inference(place_of(query), neighborhood_problem(inputs.query, inputs.key, inputs.value, windows, scale),
                       inputs);
}

Tensors neighborhood_backward(const Tensor& grad_output, const MaybeTensor& grad_logsumexp, const Tensor& query,
                              const Tensor& key, const Tensor& value, const MaybeTensor& additional_keys,
                              const MaybeTensor& additional_values, const MaybeTensor& rpb, const Tensor& output,
                              const Tensor& logsumexp, const Ints& kernel_size, const Ints& stride,
                              const Ints& dilation, const Ints& is_causal, double scale, const Ints& options,
                              std::int64_t wanted) {
  Rows rows;
  AttentionInputs inputs = inputs_of(rows, query, key, value, additional_keys, additional_values);
  inputs.rpb = view("rpb", rpb);
  return run_backward(place_of(query),
                      neighborhood_problem(inputs.query, inputs.key, inputs.value,
                                           neighborhood_of(kernel_size, stride, dilation, is_causal), scale,
                                           inputs.additional_keys, inputs.rpb),
                      inputs, grad_inputs_of(rows, grad_output, grad_logsumexp, output, logsumexp), options, wanted, 6);
}

std::tuple<Tensor, Tensor> dense(const Tensor& query, const Tensor& key, const Tensor& value,
                                 const MaybeTensor& additional_keys, const MaybeTensor& additional_values,
                                 const MaybeTensor& attn_bias, const MaybeTensor& key_lengths,
                                 const MaybeTensor& cumulative_seqlen_q, const MaybeTensor& cumulative_seqlen_kv,
                                 std::int64_t max_seqlen_q, std::int64_t max_seqlen_kv, std::int64_t causal,
                                 std::int64_t window_left, std::int64_t window_right, double scale,
                                 const Ints& options) {
  Rows rows;
  AttentionInputs inputs = inputs_of(rows, query, key, value, additional_keys, additional_values);
  inputs.attn_bias = view("attn_bias", attn_bias);
  Dense mask = dense_of(causal, window_left, window_right);
  const Place place = place_of(query);
  Lengths{key_lengths, cumulative_seqlen_q, cumulative_seqlen_kv, max_seqlen_q, max_seqlen_kv}.put(place, mask, inputs);
  return run_forward(place,
                     dense_problem(inputs.query, inputs.key, inputs.value, std::move(mask), scale,
                                   inputs.additional_keys, inputs.attn_bias),
                     inputs, options);
}

Tensor dense_inference(const Tensor& query, const Tensor& key, const Tensor& value, std::int64_t causal,
                       std::int64_t window_left, std::int64_t window_right, double scale) {
  Rows rows;
  const AttentionInputs inputs = inputs_of(rows, query, key, value, {}, {});
  return run_inference(
      place_of(query),
      dense_problem(inputs.query, inputs.key, inputs.value, dense_of(causal, window_left, window_right), scale),
      inputs);
}

Tensors dense_backward(const Tensor& grad_output, const MaybeTensor& grad_logsumexp, const Tensor& query,
                       const Tensor& key, const Tensor& value, const MaybeTensor& additional_keys,
                       const MaybeTensor& additional_values, const MaybeTensor& attn_bias,
                       const MaybeTensor& key_lengths, const MaybeTensor& cumulative_seqlen_q,
                       const MaybeTensor& cumulative_seqlen_kv, const Tensor& output, const Tensor& logsumexp,
                       std::int64_t max_seqlen_q, std::int64_t max_seqlen_kv, std::int64_t causal,
                       std::int64_t window_left, std::int64_t window_right, double scale, const Ints& options,
                       std::int64_t wanted) {
  Rows rows;
  AttentionInputs inputs = inputs_of(rows, query, key, value, additional_keys, additional_values);
  inputs.attn_bias = view("attn_bias", attn_bias);
  Dense mask = dense_of(causal, window_left, window_right);
  const Place place = place_of(query);
  Lengths{key_lengths, cumulative_seqlen_q, cumulative_seqlen_kv, max_seqlen_q, max_seqlen_kv}.put(place, mask, inputs);
  return run_backward(place,
                      dense_problem(inputs.query, inputs.key, inputs.value, std::move(mask), scale,
                                    inputs.additional_keys, inputs.attn_bias),
                      inputs, grad_inputs_of(rows, grad_output, grad_logsumexp, output, logsumexp), options, wanted, 5);
}

// --- Merging --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> merge(const Tensors& outputs, const Tensors& logsumexps) {
  const Place place = outputs.empty() ? Place() : place_of(outputs[0]);
  Rows rows;
  const auto parts = rows("outputs", outputs);
  const auto weights = views("lse_tensors", logsumexps);
  if (parts.empty() || weights.empty()) throw InvalidArgument("outputs", "empty", "one part at least");
  Tensor output = empty(place, parts[0].shape(), parts[0].dtype());
  Tensor logsumexp = empty(place, weights[0].shape(), logsumexp_dtype(parts[0].dtype()));
  Queue queue(place);
  merge_forward(parts, weights, written(output), written(logsumexp), engine_of(place), queue.stream());
  return {std::move(output), std::move(logsumexp)};
}

Tensors merge_backward(const Tensors& outputs, const Tensors& logsumexps, const Tensor& grad_output,
                       const MaybeTensor& grad_logsumexp) {
  const Place place = place_of(grad_output);
  Rows rows;
  const auto parts = rows("outputs", outputs);
  const auto weights = views("lse_tensors", logsumexps);
  Tensors result;
  std::vector<TensorView> grad_parts, grad_weights;
  for (const auto& [of, into] : {std::pair(&parts, &grad_parts), std::pair(&weights, &grad_weights)}) {
    for (const ConstTensorView& part : *of) {
      Gradient gradient = gradient_of(place, part, true, part.dtype());
      into->push_back(gradient.view);
      result.push_back(std::move(gradient.tensor));
    }
  }
  Queue queue(place);
  vicus::merge_backward(parts, weights, rows("grad_output", grad_output), view("grad_logsumexp", grad_logsumexp),
                        grad_parts, grad_weights, engine_of(place), queue.stream());
  return result;
}

// --- Unfused operators (heads first) --------------------------------------------------------------------------------

// [B, H, *X, slots] of queries [B, H, *X, D].
Ints scores_shape(const Neighborhood& mask, const ConstTensorView& query, const ConstTensorView& additional_keys) {
  if (query.dims() < 4) {
    throw InvalidArgument("query.shape", std::to_string(query.dims()) + " dimensions", "4 to 6");
  }
  Problem problem;
  problem.layout = AxisValues(query.shape().subspan(2, static_cast<std::size_t>(query.dims()) - 3));
  problem.head_dim = query.size(query.dims() - 1);
  problem.additional_tokens = additional_keys.dims() == 4 ? additional_keys.size(2) : 0;
  problem.mask = mask;
  Ints shape(query.shape().begin(), query.shape().end());
  shape.back() = score_slots(validate(std::move(problem)));
  return shape;
}

Tensor qk(const Tensor& query, const Tensor& key, const MaybeTensor& additional_keys, const MaybeTensor& rpb,
          const Ints& kernel_size, const Ints& stride, const Ints& dilation, const Ints& is_causal) {
  const Neighborhood mask = neighborhood_of(kernel_size, stride, dilation, is_causal);
  Rows rows;
  const ConstTensorView q = rows("query", query), extra = rows("additional_keys", additional_keys);
  const Place place = place_of(query);
  Tensor scores = empty(place, scores_shape(mask, q, extra), q.dtype());
  Queue queue(place);
  qk_forward(mask, q, rows("key", key), written(scores), extra, view("rpb", rpb), engine_of(place), queue.stream());
  return scores;
}

Tensors qk_backward(const Tensor& query, const Tensor& key, const MaybeTensor& additional_keys, const MaybeTensor& rpb,
                    const Tensor& grad_scores, const Ints& kernel_size, const Ints& stride, const Ints& dilation,
                    const Ints& is_causal, std::int64_t wanted) {
  const Place place = place_of(query);
  Rows rows;
  const ConstTensorView q = rows("query", query), k = rows("key", key),
                        extra = rows("additional_keys", additional_keys);
  Gradient gradients[] = {gradient_of(place, q, wants(wanted, 0), q.dtype()),
                          gradient_of(place, k, wants(wanted, 1), q.dtype()),
                          gradient_of(place, extra, wants(wanted, 2), q.dtype()),
                          gradient_of(place, view("rpb", rpb), wants(wanted, 3), q.dtype())};
  Queue queue(place);
  vicus::qk_backward(neighborhood_of(kernel_size, stride, dilation, is_causal), q, k, rows("grad_scores", grad_scores),
                     {gradients[0].view, gradients[1].view, gradients[2].view, gradients[3].view}, extra,
                     engine_of(place), queue.stream());
  return {gradients[0].tensor, gradients[1].tensor, gradients[2].tensor, gradients[3].tensor};
}

Tensor av(const Tensor& scores, const Tensor& value, const MaybeTensor& additional_values, const Ints& kernel_size,
          const Ints& stride, const Ints& dilation, const Ints& is_causal) {
  Rows rows;
  const ConstTensorView s = rows("scores", scores), v = rows("value", value);
  if (s.dims() < 1 || v.dims() < 1) throw InvalidArgument("scores.shape", "()", "4 to 6 dimensions");
  Ints shape(s.shape().begin(), s.shape().end());
  shape.back() = v.shape().back();
  const Place place = place_of(scores);
  Tensor output = empty(place, shape, s.dtype());
  Queue queue(place);
  av_forward(neighborhood_of(kernel_size, stride, dilation, is_causal), s, v, written(output),
             rows("additional_values", additional_values), engine_of(place), queue.stream());
  return output;
}

Tensors av_backward(const Tensor& scores, const Tensor& value, const MaybeTensor& additional_values,
                    const Tensor& grad_output, const Ints& kernel_size, const Ints& stride, const Ints& dilation,
                    const Ints& is_causal, std::int64_t wanted) {
  const Place place = place_of(scores);
  Rows rows;
  const ConstTensorView s = rows("scores", scores), v = rows("value", value),
                        extra = rows("additional_values", additional_values);
  Gradient gradients[] = {gradient_of(place, s, wants(wanted, 0), s.dtype()),
                          gradient_of(place, v, wants(wanted, 1), s.dtype()),
                          gradient_of(place, extra, wants(wanted, 2), s.dtype())};
  Queue queue(place);
  vicus::av_backward(neighborhood_of(kernel_size, stride, dilation, is_causal), s, v, rows("grad_output", grad_output),
                     {gradients[0].view, gradients[1].view, gradients[2].view}, extra, engine_of(place),
                     queue.stream());
  return {gradients[0].tensor, gradients[1].tensor, gradients[2].tensor};
}

// --- About this build -----------------------------------------------------------------------------------------------

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ",") + name;
  return text;
}

// Version, PyTorch's version at build time, CPU targets built, CPU targets of this machine.
std::vector<std::string> build_info() {
  return {std::string(version()), TORCH_VERSION, joined(cpu_targets_built()), joined(cpu_targets_available())};
}

// The largest head dim that engine sm80 takes, 0 where it takes none.
std::int64_t gpu_head_dim(const std::string& dtype) {
  Problem problem;
  problem.dtype = parse_dtype(dtype);
  problem.layout = 1;
  problem.mask = Dense{.keys = 1};
  std::int64_t takes = 0, refuses = 1 << 16;
  while (refuses - takes > 1) {
    problem.head_dim = problem.head_dim_v = (takes + refuses) / 2;
    (supports(problem, Engine::sm80).empty() ? takes : refuses) = problem.head_dim;
  }
  return takes;
}

// Dense::device of a report: packed sequences and the longest queries and keys; no sequences: key lengths.
DeviceLengths lengths_of(const Ints& values) {
  if (values.empty()) return {};
  if (values.size() != 3) throw InvalidArgument("lengths", std::to_string(values.size()) + " values", "none, or 3");
  return {.sequences = values[0], .max_queries = values[1], .max_keys = values[2], .key_lengths = values[0] == 0};
}

// The plan of a call on a GPU as JSON: first its counts, then a line for each kernel. `mask` as in
// neighborhood_inference; empty for dense attention, which may have lists of `lengths`.
std::vector<std::string> gpu_report(const Tensor& query, const Tensor& key, const Tensor& value, const Ints& mask,
                                    std::int64_t causal, const Ints& options, bool backward, const Ints& lengths) {
  const Place place = place_of(query);
  const std::size_t rank = mask.size() / 4;
  const std::span<const std::int64_t> all(mask);
  Rows rows;
  const AttentionInputs in = inputs_of(rows, query, key, value, {}, {});
  Dense band = dense_of(causal, -1, -1);
  band.device = lengths_of(lengths);
  const Problem problem =
      mask.empty()
          ? dense_problem(in.query, in.key, in.value, std::move(band))
          : neighborhood_problem(in.query, in.key, in.value,
                                 {AxisValues(all.subspan(0, rank)), AxisValues(all.subspan(rank, rank)),
                                  AxisValues(all.subspan(2 * rank, rank)), AxisValues(all.subspan(3 * rank, rank))});
  const auto plan = plan_for(problem, plan_options(place, options, backward ? Pass::backward : Pass::forward));
  const GpuPlan& g = plan->gpu;
  const double work = backward ? g.backward.keys.work.ratio() : g.forward.work.ratio();
  std::vector<std::string> lines = {
      "{\"mask_pairs\": " + std::to_string(plan->mask_pairs) +
      ", \"flops\": " + std::to_string(backward ? plan->backward_flops : plan->forward_flops) +
      ", \"bytes\": " + std::to_string(backward ? plan->backward_bytes : plan->forward_bytes) +
      ", \"work_ratio\": " + std::to_string(work) +
      ", \"scratch_bytes\": " + std::to_string(backward ? g.backward.scratch_bytes : g.forward_scratch_bytes) + "}"};
  const CallSet calls = {.forward = !backward, .backward = backward, .logsumexp = false};
  for (const gpu::KernelReport& k : gpu::report_kernels(*plan, calls, place.device)) {
    lines.push_back("{\"name\": \"" + k.name + "\", \"threads\": " + std::to_string(k.threads) + ", \"registers\": " +
                    std::to_string(k.registers) + ", \"local_bytes\": " + std::to_string(k.local_bytes) +
                    ", \"shared_bytes\": " + std::to_string(k.shared_bytes) +
                    ", \"blocks_per_multiprocessor\": " + std::to_string(k.blocks_per_multiprocessor) + "}");
  }
  return lines;
}

void nvrtc_directory(const std::string& directory) { jit::set_nvrtc_directory(directory); }
void end_ahead() { jit::end_ahead(); }

// The operators that compute: the tensors say where.
template <class Library>
void implement(Library& m) {
  m.impl("neighborhood_inference", TORCH_BOX(&neighborhood_inference));
  m.impl("neighborhood", TORCH_BOX(&neighborhood));
  m.impl("neighborhood_backward", TORCH_BOX(&neighborhood_backward));
  m.impl("dense_inference", TORCH_BOX(&dense_inference));
  m.impl("dense", TORCH_BOX(&dense));
  m.impl("dense_backward", TORCH_BOX(&dense_backward));
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_backward", TORCH_BOX(&merge_backward));
  m.impl("qk", TORCH_BOX(&qk));
  m.impl("qk_backward", TORCH_BOX(&qk_backward));
  m.impl("av", TORCH_BOX(&av));
  m.impl("av_backward", TORCH_BOX(&av_backward));
}

}  // namespace
}  // namespace vicus::binding

STABLE_TORCH_LIBRARY_IMPL(vicus, CPU, m) { vicus::binding::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(vicus, CUDA, m) {
  vicus::binding::implement(m);
  m.impl("gpu_report", TORCH_BOX(&vicus::binding::gpu_report));
}

STABLE_TORCH_LIBRARY_IMPL(vicus, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&vicus::binding::build_info));
  m.impl("gpu_head_dim", TORCH_BOX(&vicus::binding::gpu_head_dim));
  m.impl("nvrtc_directory", TORCH_BOX(&vicus::binding::nvrtc_directory));
  m.impl("end_ahead", TORCH_BOX(&vicus::binding::end_ahead));
}
