#include "core/checks.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "vicus/error.h"

namespace vicus {
namespace {

void require_absent(const std::string& name, const ConstTensorView& tensor, const char* allowed) {
  if (tensor) throw InvalidArgument(name, "given", allowed);
}

// A list in memory of a GPU: its length is all that can be checked here.
void require_list(const std::string& name, std::span<const std::int32_t> list, std::int64_t values) {
  if (static_cast<std::int64_t>(list.size()) != values) {
    throw InvalidArgument(name, std::to_string(list.size()) + " values",
                          values == 0 ? "none: the problem has no such list of the device" : std::to_string(values));
  }
  if (list.data() == nullptr && values > 0) throw InvalidArgument(name, "a null pointer", "data");
}

std::array<NamedView, 7> named(const AttentionInputs& in) {
  return {{{"query", in.query},
           {"key", in.key},
           {"value", in.value},
           {"additional_keys", in.additional_keys},
           {"additional_values", in.additional_values},
           {"rpb", in.rpb},
           {"attn_bias", in.attn_bias}}};
}

void check_inputs(const Problem& p, const AttentionInputs& in) {
  require_input("query", in.query, p.query_shape(), p.dtype);
  require_input("key", in.key, p.key_shape(), p.dtype);
  require_input("value", in.value, p.value_shape(), p.dtype);
  if (p.additional_tokens > 0) {
    require_input("additional_keys", in.additional_keys, p.additional_keys_shape(), p.dtype);
    require_input("additional_values", in.additional_values, p.additional_values_shape(), p.dtype);
  } else {
    for (const auto& [name, tensor] :
         {std::pair{"additional_keys", in.additional_keys}, std::pair{"additional_values", in.additional_values}}) {
      if (tensor && tensor.numel() != 0) require_absent(name, tensor, "absent: the problem has no additional tokens");
    }
  }
  if (p.rpb) {
    require_shape("rpb", in.rpb, p.rpb_shape());
    require_dtype("rpb", in.rpb, std::array{p.dtype, DType::float32, DType::float64});
  } else {
    require_absent("rpb", in.rpb, "absent: the problem has no rpb");
  }
  if (p.attn_bias) {
    const ConstTensorView& bias = in.attn_bias;
    require_present("attn_bias", bias);
    std::vector<std::int64_t> shape = {p.batch, p.heads, p.queries(), p.keys()};
    if (bias.dims() == 4) {
      for (const int i : {0, 1}) {
        if (bias.size(i) == 1) shape[static_cast<std::size_t>(i)] = 1;
      }
    }
    require_shape("attn_bias", bias, shape);
  } else {
    require_absent("attn_bias", in.attn_bias, "absent: the problem has no attn_bias");
  }
  const auto* dense = std::get_if<Dense>(&p.mask);
  const DeviceLengths of = dense == nullptr ? DeviceLengths() : dense->device;
  const std::int64_t bounds = of.sequences > 0 ? of.sequences + 1 : 0;
  require_list("cumulative_queries", in.cumulative_queries, bounds);
  require_list("cumulative_keys", in.cumulative_keys, bounds);
  require_list("key_lengths", in.key_lengths, of.key_lengths ? p.batch : 0);
}

}  // namespace

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void require_present(const std::string& name, const ConstTensorView& tensor) {
  if (!tensor) throw InvalidArgument(name, "absent", "a tensor");
}

void require_shape(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape) {
  require_present(name, tensor);
  if (!std::equal(shape.begin(), shape.end(), tensor.shape().begin(), tensor.shape().end())) {
    throw InvalidArgument(name + ".shape", shape_text(tensor), shape_text(shape));
  }
  if (tensor.data() == nullptr && tensor.numel() != 0) throw InvalidArgument(name, "a null pointer", "data");
}

void require_dtype(const std::string& name, const ConstTensorView& tensor, std::span<const DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), tensor.dtype()) != allowed.end()) return;
  std::string text;
  std::vector<DType> named;
  for (const DType dtype : allowed) {
    if (std::find(named.begin(), named.end(), dtype) != named.end()) continue;
    named.push_back(dtype);
    text += (text.empty() ? "" : ", ") + std::string(dtype_name(dtype));
  }
  throw InvalidArgument(name + ".dtype", std::string(dtype_name(tensor.dtype())), text);
}

void require_contiguous_rows(const std::string& name, const ConstTensorView& tensor) {
  const int last = tensor.dims() - 1;
  if (last < 0 || tensor.size(last) <= 1 || tensor.numel() == 0 || tensor.stride(last) == 1) return;
  throw InvalidArgument(name + ".strides[" + std::to_string(last) + "]", std::to_string(tensor.stride(last)),
                        "1: the last dimension must be contiguous");
}

void require_distinct(const std::string& name, const ConstTensorView& tensor) {
  // Dimensions by growing stride: each must step over the whole extent of those before it.
  std::vector<int> order;
  for (int i = 0; i < tensor.dims(); ++i) {
    if (tensor.size(i) == 0) return;
    if (tensor.size(i) > 1) order.push_back(i);
  }
  const auto step = [&](int i) { return std::abs(tensor.stride(i)); };
  std::sort(order.begin(), order.end(), [&](int a, int b) { return step(a) < step(b); });
  std::int64_t reach = 0;  // offset of the last element of the dimensions so far
  for (const int i : order) {
    if (step(i) <= reach) {
      throw InvalidArgument(name + ".strides[" + std::to_string(i) + "]", std::to_string(tensor.stride(i)),
                            "strides that give every element of an output its own place");
    }
    reach += step(i) * (tensor.size(i) - 1);
  }
}

void require_separate(std::span<const NamedView> outputs, std::span<const NamedView> inputs) {
  const auto holds_data = [](const NamedView& t) { return t.view && t.view.numel() > 0; };
  const auto compare = [&](const NamedView& out, const NamedView& other) {
    if (holds_data(out) && holds_data(other) && out.view.data() == other.view.data()) {
      throw InvalidArgument(out.name, std::string("in the memory of ") + other.name, "memory of its own");
    }
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) compare(outputs[i], outputs[j]);
    for (const NamedView& input : inputs) compare(outputs[i], input);
  }
}

void require_input(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape,
                   DType dtype) {
  require_shape(name, tensor, shape);
  require_dtype(name, tensor, std::array{dtype});
  require_contiguous_rows(name, tensor);
}

void require_output(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape,
                    DType dtype) {
  require_input(name, tensor, shape, dtype);
  require_distinct(name, tensor);
}

void require_logsumexp(const std::string& name, const ConstTensorView& tensor, std::span<const std::int64_t> shape,
                       DType dtype, bool output) {
  require_shape(name, tensor, shape);
  if (dtype == DType::float64) {
    require_dtype(name, tensor, std::array{DType::float32, DType::float64});
  } else {
    require_dtype(name, tensor, std::array{DType::float32});
  }
  if (output) require_distinct(name, tensor);
}

void check_forward(const Problem& p, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp) {
  check_inputs(p, in);
  require_output("output", output, p.output_shape(), p.dtype);
  if (logsumexp) require_logsumexp("logsumexp", logsumexp, p.logsumexp_shape(), p.dtype, true);
  require_separate(std::array<NamedView, 2>{{{"output", output}, {"logsumexp", logsumexp}}}, named(in));
}

void check_backward(const Problem& p, const AttentionInputs& in, const AttentionGradInputs& grads,
                    const AttentionGradients& out) {
  check_inputs(p, in);
  require_input("output", grads.output, p.output_shape(), p.dtype);
  require_input("grad_output", grads.grad_output, p.output_shape(), p.dtype);
  require_logsumexp("logsumexp", grads.logsumexp, p.logsumexp_shape(), p.dtype, false);
  if (grads.grad_logsumexp) {
    require_logsumexp("grad_logsumexp", grads.grad_logsumexp, p.logsumexp_shape(), p.dtype, false);
  }
  if (out.query) require_output("grad_query", out.query, p.query_shape(), p.dtype);
  if (out.key) require_output("grad_key", out.key, p.key_shape(), p.dtype);
  if (out.value) require_output("grad_value", out.value, p.value_shape(), p.dtype);
  if (out.additional_keys) {
    require_output("grad_additional_keys", out.additional_keys, p.additional_keys_shape(), p.dtype);
  }
  if (out.additional_values) {
    require_output("grad_additional_values", out.additional_values, p.additional_values_shape(), p.dtype);
  }
  if (out.rpb) {
    if (!p.rpb) throw InvalidArgument("grad_rpb", "given", "absent: the problem has no rpb");
    require_shape("grad_rpb", out.rpb, p.rpb_shape());
    require_dtype("grad_rpb", out.rpb, std::array{in.rpb.dtype()});
    require_distinct("grad_rpb", out.rpb);
  }
  const std::array<NamedView, 6> outputs = {{{"grad_query", out.query},
                                             {"grad_key", out.key},
                                             {"grad_value", out.value},
                                             {"grad_additional_keys", out.additional_keys},
                                             {"grad_additional_values", out.additional_values},
                                             {"grad_rpb", out.rpb}}};
  require_separate(outputs, named(in));
  require_separate(outputs, std::array<NamedView, 4>{{{"output", grads.output},
                                                      {"logsumexp", grads.logsumexp},
                                                      {"grad_output", grads.grad_output},
                                                      {"grad_logsumexp", grads.grad_logsumexp}}});
}

}  // namespace vicus
