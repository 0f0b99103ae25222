#include "torch/lengths.h"

#include <string>

#include "vicus/error.h"

namespace vicus::binding {

void Lengths::put(const Place& place, Dense& mask, AttentionInputs& inputs) const {
  if (!place.cuda) {
    mask.key_lengths = integers("key_lengths", keys);
    mask.cumulative_queries = integers("cumulative_seqlen_q", cumulative_q);
    mask.cumulative_keys = integers("cumulative_seqlen_kv", cumulative_kv);
    return;
  }
  inputs.key_lengths = device_list("key_lengths", keys, place);
  inputs.cumulative_queries = device_list("cumulative_seqlen_q", cumulative_q, place);
  inputs.cumulative_keys = device_list("cumulative_seqlen_kv", cumulative_kv, place);
  mask.device.key_lengths = keys.has_value();
  if (!cumulative_q && !cumulative_kv) return;
  mask.device.sequences = static_cast<std::int64_t>(inputs.cumulative_queries.size()) - 1;
  if (mask.device.sequences < 1) {
    throw InvalidArgument("cumulative_seqlen_q", std::to_string(inputs.cumulative_queries.size()) + " values",
                          "2 or more: where each sequence begins, and where the last one ends");
  }
  mask.device.max_queries = max_q;
  mask.device.max_keys = max_kv;
}

}  // namespace vicus::binding
