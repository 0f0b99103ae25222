// The reference engine: loops over the definition in float64, one query at a time. Never fast, never wrong.
//
// Per query, over its keys j (window in row-major order, then additional tokens):
//   s_j = scale * q.k_j + bias_j,  lse = log sum_j exp(s_j),  p_j = exp(s_j - lse),  o = sum_j p_j v_j
//   dp_j = do.v_j,  ds_j = p_j * (dp_j - do.o + dlse),  dq += scale ds_j k_j,  dk_j += scale ds_j q,  dv_j += p_j do
// The backward pass recomputes p and o; it does not read the output and logsumexp of the forward call.
#include <cmath>
#include <limits>
#include <vector>

#include "core/domain.h"
#include "core/elements.h"
#include "core/engines.h"
#include "core/numbers.h"

namespace vicus::reference {
namespace {

using geometry::Span;

double at(const ConstTensorView& t, std::int64_t offset) { return load_element(t.data(), t.dtype(), offset); }

// A key of one query: where its rows start, and its bias.
struct Key {
  bool additional = false;
  std::int64_t key_row = 0, value_row = 0, grad_key_row = 0, grad_value_row = 0, rpb = 0;
  double bias = 0;
};

// Gradients are summed in float64, in arrays laid out like contiguous tensors, and stored at the end.
struct Sum {
  explicit Sum(const TensorView& target) : layout(target.shape()) {
    if (target) data.assign(static_cast<std::size_t>(layout.numel()), 0.0);
  }
  void add(std::int64_t offset, double x) {
    if (!data.empty()) data[static_cast<std::size_t>(offset)] += x;
  }
  void store(const TensorView& target) const {
    for_each_element(target, [&](std::int64_t index, std::int64_t offset) {
      store_element(target.data(), target.dtype(), offset, data[static_cast<std::size_t>(index)]);
    });
  }
  TensorLayout layout;
  std::vector<double> data;
};

struct Sums {
  Sum query, key, value, additional_keys, additional_values, rpb;
};

// One query of one head: its keys, logits, probabilities.
class Row {
 public:
  Row(const Problem& problem, const AttentionInputs& in) : p_(problem), in_(in) {}

  void collect(const Cell& cell, const Position& q, std::int64_t head, const Sums* sums) {
    keys_.clear();
    const std::int64_t kv_head = head / (p_.heads / p_.heads_kv);
    const RowMap key_map = row_map(in_.key, p_, cell, cell.first_key);
    const RowMap value_map = row_map(in_.value, p_, cell, cell.first_key);
    const RowMap grad_key_map = sums ? row_map(contiguous(sums->key), p_, cell, cell.first_key) : RowMap{};
    const RowMap grad_value_map = sums ? row_map(contiguous(sums->value), p_, cell, cell.first_key) : RowMap{};
    const RpbMap rpb = p_.rpb ? rpb_map(in_.rpb, p_) : RpbMap{};
    const RpbMap grad_rpb = p_.rpb && sums ? rpb_map(contiguous(sums->rpb), p_) : RpbMap{};
    const Span a = geometry::window(cell.grid.axis[0], q[0]);
    const Span b = geometry::window(cell.grid.axis[1], q[1]);
    const Span c = geometry::window(cell.grid.axis[2], q[2]);
    for (int i = a.begin; i < a.end; ++i) {
      for (int j = b.begin; j < b.end; ++j) {
        for (int k = c.begin; k < c.end; ++k) {
          const Position pos = {i, j, k};
          Key key;
          key.key_row = key_map.row(pos, kv_head);
          key.value_row = value_map.row(pos, kv_head);
          if (sums) {
            key.grad_key_row = grad_key_map.row(pos, kv_head);
            key.grad_value_row = grad_value_map.row(pos, kv_head);
          }
          if (p_.rpb) {
            key.bias = at(in_.rpb, head * in_.rpb.stride(0) + rpb.offset(pos, q));
            if (sums) key.rpb = head * contiguous(sums->rpb).stride(0) + grad_rpb.offset(pos, q);
          }
          if (p_.attn_bias) {
            const ConstTensorView& m = in_.attn_bias;
            key.bias = at(m, (m.size(0) == 1 ? 0 : cell.batch * m.stride(0)) +
                                 (m.size(1) == 1 ? 0 : head * m.stride(1)) + q[2] * m.stride(2) + k * m.stride(3));
            if (key.bias == -std::numeric_limits<double>::infinity()) continue;  // hidden
          }
          keys_.push_back(key);
        }
      }
    }
    for (int t = 0; t < p_.additional_tokens; ++t) {
      const Position pos = {0, 0, t};
      Key key;
      key.additional = true;
      key.key_row = additional_row_map(in_.additional_keys, cell.batch).row(pos, kv_head);
      key.value_row = additional_row_map(in_.additional_values, cell.batch).row(pos, kv_head);
      if (sums) {
        key.grad_key_row = additional_row_map(contiguous(sums->additional_keys), cell.batch).row(pos, kv_head);
        key.grad_value_row = additional_row_map(contiguous(sums->additional_values), cell.batch).row(pos, kv_head);
      }
      keys_.push_back(key);
    }
  }

  // Probabilities of the collected keys; returns the logsumexp.
  double softmax(std::int64_t query_row) {
    probability_.clear();
    double top = -std::numeric_limits<double>::infinity();
    for (const Key& key : keys_) {
      const ConstTensorView& t = key.additional ? in_.additional_keys : in_.key;
      double dot = 0;
      for (std::int64_t d = 0; d < p_.head_dim; ++d) dot += at(in_.query, query_row + d) * at(t, key.key_row + d);
      probability_.push_back(dot * p_.effective_scale() + key.bias);
      top = std::max(top, probability_.back());
    }
    if (std::isinf(top) && top < 0) {
      bool any_nan = false;
      for (const double s : probability_) any_nan = any_nan || std::isnan(s);
      for (double& x : probability_) x = any_nan ? std::numeric_limits<double>::quiet_NaN() : 0;
      return any_nan ? std::numeric_limits<double>::quiet_NaN() : top;
    }
    double sum = 0;
    for (double& x : probability_) sum += x = std::exp(x - top);
    for (double& x : probability_) x /= sum;
    return top + std::log(sum);
  }

  double value(std::size_t key, std::int64_t d) const {
    const Key& k = keys_[key];
    return at(k.additional ? in_.additional_values : in_.value, k.value_row + d);
  }
  double key(std::size_t key, std::int64_t d) const {
    const Key& k = keys_[key];
    return at(k.additional ? in_.additional_keys : in_.key, k.key_row + d);
  }
  [[nodiscard]] const std::vector<Key>& keys() const { return keys_; }
  [[nodiscard]] double probability(std::size_t key) const { return probability_[key]; }

 private:
  static const TensorLayout& contiguous(const Sum& sum) { return sum.layout; }

  const Problem& p_;
  const AttentionInputs& in_;
  std::vector<Key> keys_;
  std::vector<double> probability_;
};

template <class Visit>
void for_each_query(const Problem& problem, const Visit& visit) {
  const Domain domain(problem);
  for (std::int64_t index = 0; index < domain.size(); ++index) {
    const Cell cell = domain.cell(index);
    for (std::int64_t head = 0; head < problem.heads; ++head) {
      for (int i = 0; i < cell.grid.axis[0].queries; ++i) {
        for (int j = 0; j < cell.grid.axis[1].queries; ++j) {
          for (int k = 0; k < cell.grid.axis[2].queries; ++k) visit(cell, Position{i, j, k}, head);
        }
      }
    }
  }
}

}  // namespace

void forward(const Problem& p, const AttentionInputs& in, const TensorView& output, const TensorView& logsumexp) {
  Row row(p, in);
  for_each_query(p, [&](const Cell& cell, const Position& q, std::int64_t head) {
    row.collect(cell, q, head, nullptr);
    const double lse = row.softmax(row_map(in.query, p, cell, cell.first_query).row(q, head));
    const std::int64_t out = row_map(output, p, cell, cell.first_query).row(q, head);
    for (std::int64_t d = 0; d < p.head_dim_v; ++d) {
      double sum = 0;
      for (std::size_t j = 0; j < row.keys().size(); ++j) sum += row.probability(j) * row.value(j, d);
      store_element(output.data(), output.dtype(), out + d, sum);
    }
    if (logsumexp) {
      store_element(logsumexp.data(), logsumexp.dtype(), row_map(logsumexp, p, cell, cell.first_query).row(q, head),
                    lse);
    }
  });
}

void backward(const Problem& p, const AttentionInputs& in, const AttentionGradInputs& grads,
              const AttentionGradients& out) {
  Sums sums = {Sum(out.query), Sum(out.key), Sum(out.value), Sum(out.additional_keys), Sum(out.additional_values),
               Sum(out.rpb)};
  // Absent gradients still need a layout to be addressed by.
  const auto shaped = [](Sum& sum, const std::vector<std::int64_t>& shape) { sum.layout = TensorLayout(shape); };
  shaped(sums.query, p.query_shape());
  shaped(sums.key, p.key_shape());
  shaped(sums.value, p.value_shape());
  shaped(sums.additional_keys, p.additional_keys_shape());
  shaped(sums.additional_values, p.additional_values_shape());
  if (p.rpb) shaped(sums.rpb, p.rpb_shape());
  Row row(p, in);
  const double scale = p.effective_scale();
  std::vector<double> grad_p;
  for_each_query(p, [&](const Cell& cell, const Position& q, std::int64_t head) {
    row.collect(cell, q, head, &sums);
    const std::int64_t query_row = row_map(in.query, p, cell, cell.first_query).row(q, head);
    const std::int64_t grad_row = row_map(grads.grad_output, p, cell, cell.first_query).row(q, head);
    const std::int64_t grad_query_row = row_map(sums.query.layout, p, cell, cell.first_query).row(q, head);
    row.softmax(query_row);
    double grad_lse = 0;
    if (grads.grad_logsumexp) {
      grad_lse = at(grads.grad_logsumexp, row_map(grads.grad_logsumexp, p, cell, cell.first_query).row(q, head));
    }
    grad_p.assign(row.keys().size(), 0.0);
    double delta = 0;  // do . o
    for (std::size_t j = 0; j < row.keys().size(); ++j) {
      for (std::int64_t d = 0; d < p.head_dim_v; ++d)
        grad_p[j] += at(grads.grad_output, grad_row + d) * row.value(j, d);
      delta += row.probability(j) * grad_p[j];
    }
    for (std::size_t j = 0; j < row.keys().size(); ++j) {
      const Key& key = row.keys()[j];
      const double ds = row.probability(j) * (grad_p[j] - delta + grad_lse);
      Sum& grad_key = key.additional ? sums.additional_keys : sums.key;
      Sum& grad_value = key.additional ? sums.additional_values : sums.value;
      for (std::int64_t d = 0; d < p.head_dim; ++d) {
        sums.query.add(grad_query_row + d, scale * ds * row.key(j, d));
        grad_key.add(key.grad_key_row + d, scale * ds * at(in.query, query_row + d));
      }
      for (std::int64_t d = 0; d < p.head_dim_v; ++d) {
        grad_value.add(key.grad_value_row + d, row.probability(j) * at(grads.grad_output, grad_row + d));
      }
      if (p.rpb && !key.additional) sums.rpb.add(key.rpb, ds);
    }
  });
  if (out.query) sums.query.store(out.query);
  if (out.key) sums.key.store(out.key);
  if (out.value) sums.value.store(out.value);
  if (out.additional_keys) sums.additional_keys.store(out.additional_keys);
  if (out.additional_values) sums.additional_values.store(out.additional_values);
  if (out.rpb) sums.rpb.store(out.rpb);
}

}  // namespace vicus::reference
