#include "cli/attend.h"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cli/arrays.h"
#include "cli/problem_options.h"
#include "cli/validators.h"
#include "vicus/attention.h"
#include "vicus/device.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

constexpr const char* kFooter =
    R"(Arrays are [batch, tokens..., heads, features], as float32, float64, float16 or bfloat16. A place is FILE.npy or
FILE.safetensors; FILE.safetensors:NAME picks a tensor, otherwise the role is its name (query, output, ...).

Examples:
  vicus attend -q q.npy -k k.npy -v v.npy --kernel-size 7 7 -o out.npy --lse lse.npy
      Each token of an image sees the 7 x 7 tokens around it.
  vicus attend --input qkv.safetensors --dense --causal bottom-right -o out.safetensors --lse out.safetensors
      Causal attention over whole sequences; output and logsumexp in one file.)";

struct AttendOptions {
  std::string input, query, key, value, additional_keys, additional_values, rpb, attn_bias;
  std::vector<std::string> names;
  std::string output, logsumexp;
  std::string dtype;
  MaskOptions mask;
  EngineOptions engine;
};

struct Operands {
  Array query, key, value, additional_keys, additional_values, rpb, attn_bias;
};

/// Where query (0), key (1) or value (2) comes from: an option of its own, or --input.
std::string place_of(const AttendOptions& options, std::size_t which) {
  static constexpr std::array<const char*, 3> kOption = {"--query", "--key", "--value"};
  static constexpr std::array<const char*, 3> kRole = {"query", "key", "value"};
  const std::array<const std::string*, 3> own = {&options.query, &options.key, &options.value};
  if (options.input.empty()) {
    if (own[which]->empty()) throw InvalidArgument(kOption[which], "missing", "a file, or --input for all three");
    return *own[which];
  }
  if (!own[which]->empty()) throw InvalidArgument(kOption[which], "given with --input", "one of the two");
  return options.input + ":" + (options.names.empty() ? kRole[which] : options.names[which]);
}

Operands read_operands(const AttendOptions& options, Files& files) {
  if (!options.input.empty() && !options.input.ends_with(".safetensors")) {
    throw InvalidArgument("--input", "'" + options.input + "'", "a .safetensors file that holds query, key and value");
  }
  if (!options.names.empty() && options.input.empty()) throw InvalidArgument("--names", "given", "with --input only");
  if (options.mask.dense && !options.rpb.empty()) {
    throw InvalidArgument("--rpb", "given with --dense", "with --kernel-size only");
  }
  if (!options.mask.dense && !options.attn_bias.empty()) {
    throw InvalidArgument("--attn-bias", "given with --kernel-size", "with --dense only");
  }
  if (options.additional_keys.empty() != options.additional_values.empty()) {
    const bool keys = options.additional_keys.empty();
    throw InvalidArgument(keys ? "--additional-keys" : "--additional-values", "missing",
                          keys ? "given, as --additional-values is" : "given, as --additional-keys is");
  }
  ArrayReader reader(files, options.dtype == "bfloat16");
  const bool one = !options.input.empty();
  Operands operands;
  operands.query = reader.read(one ? "--input" : "--query", place_of(options, 0), "query");
  operands.key = reader.read(one ? "--input" : "--key", place_of(options, 1), "key");
  operands.value = reader.read(one ? "--input" : "--value", place_of(options, 2), "value");
  const auto optional = [&](const std::string& argument, const std::string& place, const std::string& name) {
    return place.empty() ? Array() : reader.read(argument, place, name);
  };
  operands.additional_keys = optional("--additional-keys", options.additional_keys, "additional_keys");
  operands.additional_values = optional("--additional-values", options.additional_values, "additional_values");
  operands.rpb = optional("--rpb", options.rpb, "rpb");
  operands.attn_bias = optional("--attn-bias", options.attn_bias, "attn_bias");
  return operands;
}

Problem problem_of(const AttendOptions& options, const AttentionInputs& inputs) {
  const auto mask = make_mask(options.mask);
  if (const auto* neighborhood = std::get_if<Neighborhood>(&mask)) {
    return neighborhood_problem(inputs.query, inputs.key, inputs.value, *neighborhood, options.mask.scale,
                                inputs.additional_keys, inputs.rpb);
  }
  return dense_problem(inputs.query, inputs.key, inputs.value, std::get<Dense>(mask), options.mask.scale,
                       inputs.additional_keys, inputs.attn_bias);
}

TensorView allocate(OutputArray& array, DType dtype, std::vector<std::int64_t> shape) {
  array.dtype = dtype;
  array.shape = std::move(shape);
  const TensorLayout layout{std::span<const std::int64_t>(array.shape)};
  array.data.resize(static_cast<std::size_t>(layout.numel()) * dtype_size(dtype));
  return {array.data.data(), dtype, layout};
}

std::size_t bytes_of(const ConstTensorView& view) {
  return view ? static_cast<std::size_t>(view.numel()) * dtype_size(view.dtype()) : 0;
}

/// `forward` of arrays in memory of the host.
void forward_on_device(const Plan& plan, AttentionInputs inputs, const TensorView& output,
                       const TensorView& logsumexp) {
  std::vector<DeviceMemory> copies;
  for (ConstTensorView* const view : {&inputs.query, &inputs.key, &inputs.value, &inputs.additional_keys,
                                      &inputs.additional_values, &inputs.rpb, &inputs.attn_bias}) {
    if (!*view) continue;
    const DeviceMemory& copy = copies.emplace_back(bytes_of(*view));
    copy.write(view->data());
    *view = ConstTensorView(copy.data(), view->dtype(), *view);
  }
  const DeviceMemory result(bytes_of(output)), sums(bytes_of(logsumexp));
  const TensorView sums_view = logsumexp ? TensorView(sums.data(), logsumexp.dtype(), logsumexp) : TensorView();
  forward(plan, inputs, TensorView(result.data(), output.dtype(), output), sums_view);
  result.read(output.data());
  sums.read(logsumexp.data());
}

void attend(const AttendOptions& options, Files& files) {
  (void)make_mask(options.mask);  // options that contradict each other are reported before any file is opened
  const PlanOptions plan_options = make_plan_options(options.engine);
  std::vector<OutputArray> outputs(options.logsumexp.empty() ? 1 : 2);
  outputs[0].argument = "--output";
  outputs[0].place = options.output;
  outputs[0].name = "output";
  if (outputs.size() > 1) {
    outputs[1].argument = "--lse";
    outputs[1].place = options.logsumexp;
    outputs[1].name = "logsumexp";
  }
  check_outputs(files, outputs);

  const Operands operands = read_operands(options, files);
  AttentionInputs inputs;
  inputs.query = operands.query.view();
  inputs.key = operands.key.view();
  inputs.value = operands.value.view();
  inputs.additional_keys = operands.additional_keys.view();
  inputs.additional_values = operands.additional_values.view();
  inputs.rpb = operands.rpb.view();
  inputs.attn_bias = operands.attn_bias.view();

  const Plan plan = choose_plan(problem_of(options, inputs), plan_options);
  const Problem& problem = plan.problem;
  const TensorView output = allocate(outputs[0], problem.dtype, problem.output_shape());
  TensorView logsumexp;
  if (outputs.size() > 1) {
    logsumexp = allocate(outputs[1], problem.dtype == DType::float64 ? DType::float64 : DType::float32,
                         problem.logsumexp_shape());
  }
  if (runs_on_gpu(plan.engine)) {
    forward_on_device(plan, inputs, output, logsumexp);
  } else {
    forward(plan, inputs, output, logsumexp);
  }
  write_arrays(files, outputs);
}

}  // namespace

void add_attend(CLI::App& app, Context& context) {
  auto options = std::make_shared<AttendOptions>();
  CLI::App* command = app.add_subcommand("attend", "Compute attention of arrays in files: softmax(scale q.k + bias) v");
  command->footer(kFooter);
  const auto place = [&](const std::string& name, std::string& value, const std::string& help, const char* group) {
    return command->add_option(name, value, help)->check(not_empty())->type_name("FILE")->group(group);
  };
  const char* const inputs = "Arrays in";
  place("-q,--query", options->query, "Query [B, *X, H, D]", inputs);
  place("-k,--key", options->key, "Key [B, *X, Hkv, D]", inputs);
  place("-v,--value", options->value, "Value [B, *X, Hkv, Dv]", inputs);
  place("-i,--input", options->input, "A .safetensors file with all three instead", inputs);
  command->add_option("--names", options->names, "Their names in it [query key value]")
      ->expected(3)
      ->delimiter(',')
      ->type_name("NAME")
      ->group(inputs);
  place("--additional-keys", options->additional_keys, "Extra keys that every query sees [B, T, Hkv, D]", inputs);
  place("--additional-values", options->additional_values, "Their values [B, T, Hkv, Dv]", inputs);
  place("--rpb", options->rpb, "Relative positional bias [H, 2 w - 1, ...] (neighborhood)", inputs);
  place("--attn-bias", options->attn_bias, "Additive mask [B or 1, H or 1, Sq, Sk] (dense)", inputs);
  command->add_option("--dtype", options->dtype, "bfloat16: what two-byte .npy elements without a type are")
      ->check(CLI::IsMember({"bfloat16"}))
      ->type_name("NAME")
      ->group(inputs);
  const char* const outputs = "Arrays out (replaced whole or not at all)";
  place("-o,--output", options->output, "Output [B, *X, H, Dv]", outputs)->required();
  place("--lse", options->logsumexp, "Logarithm of the softmax's denominator [B, *X, H]", outputs);
  add_mask_options(*command, options->mask);
  add_engine_options(*command, options->engine);
  command->callback([options, &context] { context.action = [options, &context] { attend(*options, context.files); }; });
}

}  // namespace vicus::cli
