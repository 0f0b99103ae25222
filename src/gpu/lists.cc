#include "gpu/lists.h"

#include <algorithm>
#include <string>
#include <vector>

#include "jit/device.h"
#include "jit/module.h"
#include "vicus/error.h"

namespace vicus::gpu {
namespace {

using List = std::vector<std::int64_t>;

int longest_of(const List& cumulative) {
  std::int64_t most = 0;
  for (std::size_t i = 1; i < cumulative.size(); ++i) most = std::max(most, cumulative[i] - cumulative[i - 1]);
  return static_cast<int>(most);
}

std::array<int, 3> longest(const Problem& p, bool of_keys) {
  std::array<int, 3> tokens{1, 1, 1};
  const auto* dense = std::get_if<Dense>(&p.mask);
  if (dense != nullptr && dense->device.sequences > 0) {
    tokens[2] = static_cast<int>(of_keys ? dense->device.max_keys : dense->device.max_queries);
  } else if (dense != nullptr && dense->packed()) {
    tokens[2] = longest_of(of_keys ? dense->cumulative_keys : dense->cumulative_queries);
  } else if (dense != nullptr && of_keys) {
    tokens[2] = static_cast<int>(dense->keys);
  } else {
    for (int i = 0; i < p.rank(); ++i)
      tokens[static_cast<std::size_t>(3 - p.rank() + i)] = static_cast<int>(p.layout[i]);
  }
  return tokens;
}

/// Lists that the problem itself holds, one after the other, as the kernels read them.
std::vector<std::int32_t> held_by(const Problem& p) {
  std::vector<std::int32_t> all;
  const auto* dense = std::get_if<Dense>(&p.mask);
  if (dense == nullptr) return all;
  for (const List* list : {&dense->cumulative_queries, &dense->cumulative_keys, &dense->key_lengths}) {
    for (const std::int64_t value : *list) all.push_back(static_cast<std::int32_t>(value));  // at most kMaxLen
  }
  return all;
}

/// How many values are to be copied.
std::size_t allowed(const std::vector<std::int32_t>& held, void* stream) {
  if (!held.empty() && jit::capturing(stream)) {
    throw Unsupported(
        "cumulative_queries, cumulative_keys and key_lengths of the problem are copied to the device by every call, "
        "and "
        "the stream is being captured into a CUDA graph; a problem with Dense::device takes lists that are there");
  }
  return held.size();
}

const int* on_device(const char* name, std::span<const std::int32_t> list, int device) {
  if (list.empty()) return nullptr;
  if (const int at = jit::device_of(list.data()); at != device) {
    throw InvalidArgument(name, at < 0 ? "memory of the host" : "memory of device " + std::to_string(at),
                          "memory of the device of the tensors, " + std::to_string(device));
  }
  return list.data();
}

}  // namespace

std::array<int, 3> longest_queries(const Problem& problem) { return longest(problem, false); }
std::array<int, 3> longest_keys(const Problem& problem) { return longest(problem, true); }

std::int64_t sequences_of(const Problem& problem) {
  const auto* dense = std::get_if<Dense>(&problem.mask);
  return dense != nullptr && dense->packed() ? dense->sequences() : problem.batch;
}

Lists::Lists(const Problem& problem, const AttentionInputs& inputs, int device, void* stream)
    : Lists(held_by(problem), problem, inputs, device, stream) {}

Lists::Lists(const std::vector<std::int32_t>& held, const Problem& problem, const AttentionInputs& inputs, int device,
             void* stream)
    : copies_(allowed(held, stream) * sizeof(std::int32_t), stream) {
  if (held.empty()) {
    cumulative_queries_ = on_device("cumulative_queries", inputs.cumulative_queries, device);
    cumulative_keys_ = on_device("cumulative_keys", inputs.cumulative_keys, device);
    key_lengths_ = on_device("key_lengths", inputs.key_lengths, device);
    return;
  }
  copies_.fill(held.data(), held.size() * sizeof(std::int32_t));
  const auto* first = static_cast<const int*>(copies_.data());
  const auto& dense = std::get<Dense>(problem.mask);
  if (dense.packed()) {
    cumulative_queries_ = first;
    cumulative_keys_ = first + dense.cumulative_queries.size();
  } else {
    key_lengths_ = first;
  }
}

void Lists::fill(ForwardArgs& args) const {
  args.cumulative_queries = cumulative_queries_;
  args.cumulative_keys = cumulative_keys_;
  args.key_lengths = key_lengths_;
}

RestArgs rests_of(const Problem& problem, const ForwardArgs& args, std::initializer_list<Filled> tensors) {
  RestArgs rests;
  for (const auto& [tensor, of_keys] : tensors) {
    if (!tensor) continue;
    Rest& rest = rests.rests[rests.count++];
    rest.rows = rows_of(tensor, problem.rank());
    rest.begin = (of_keys ? args.cumulative_keys : args.cumulative_queries) + sequences_of(problem);
    rest.tokens = static_cast<int>(tensor.size(1));
    rest.heads = static_cast<int>(tensor.size(2));
    rest.bytes = static_cast<int>(dtype_size(tensor.dtype()));
    if (tensor.dims() == 4) {
      rest.width = static_cast<int>(tensor.size(3));
    } else {  // a logsumexp: -inf
      rest.value = tensor.dtype() == DType::float64 ? 0xfff0000000000000 : 0xff800000;
    }
  }
  return rests;
}

}  // namespace vicus::gpu
