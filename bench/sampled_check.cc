#include "sampled_check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "vicus/geometry.h"

namespace vicus::bench {
namespace {

using Row = std::vector<double>;

double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void add(Row& sum, double factor, const Row& x) {
  sum.resize(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) sum[i] += factor * x[i];
}

/// Largest error and largest value of one result.
class Compare {
 public:
  void operator()(const Row& got, const Row& want) {
    for (std::size_t i = 0; i < want.size(); ++i) {
      const double error = std::abs(got[i] - want[i]);
      error_ = std::isnan(error) ? HUGE_VAL : std::max(error_, error);
      size_ = std::max(size_, std::abs(want[i]));
    }
  }
  [[nodiscard]] double relative() const { return size_ > 0 ? error_ / size_ : error_; }

 private:
  double error_ = 0, size_ = 0;
};

/// One (batch entry, head) of the problem's tensors.
class Slice {
 public:
  Slice(const Problem& problem, const ProblemTensors& tensors, std::int64_t batch, std::int64_t head)
      : problem_(problem), t_(tensors), batch_(batch), head_(head), scale_(problem.effective_scale()) {
    for (int axis = 0; axis < problem.rank(); ++axis) {
      const int length = static_cast<int>(problem.layout[axis]);
      if (const auto* dense = std::get_if<Dense>(&problem.mask)) {
        axes_.push_back(
            geometry::band_axis(length, static_cast<int>(dense->keys), -1, dense->causal == Causal::none ? -1 : 0, 0));
      } else {
        const auto& neighborhood = std::get<Neighborhood>(problem.mask);
        axes_.push_back(
            geometry::neighborhood_axis(length, static_cast<int>(neighborhood.kernel_size[axis]), 1, false));
      }
    }
  }

  Row query(std::int64_t token) const { return row(t_.query, token, problem_.head_dim); }
  Row key(std::int64_t token) const { return row(t_.key, token, problem_.head_dim); }
  Row value(std::int64_t token) const { return row(t_.value, token, problem_.head_dim_v); }
  Row grad_output(std::int64_t token) const { return row(t_.grad_output, token, problem_.head_dim_v); }
  Row row(const Tensor& tensor, std::int64_t token, std::int64_t dim) const {
    return tensor.read(((batch_ * problem_.queries() + token) * problem_.heads + head_) * dim, dim);
  }

  void check_query(std::int64_t token, std::array<Compare, 5>& compare, bool backward) const {
    const Row q = query(token);
    std::vector<std::int64_t> seen;
    Row logits;
    for (std::int64_t k = 0; k < problem_.keys(); ++k) {
      if (!sees(token, k)) continue;
      seen.push_back(k);
      logits.push_back(scale_ * dot(q, key(k)));
    }
    const double most = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const double x : logits) sum += std::exp(x - most);
    const double logsumexp = most + std::log(sum);
    Row output;
    for (std::size_t i = 0; i < seen.size(); ++i) add(output, std::exp(logits[i] - logsumexp), value(seen[i]));
    compare[0](row(t_.output, token, problem_.head_dim_v), output);
    compare[1](row(t_.logsumexp, token, 1), {logsumexp});
    if (!backward) return;
    const Row grad = grad_output(token);
    const double delta = dot(grad, output);
    Row grad_query;
    for (std::size_t i = 0; i < seen.size(); ++i) {
      add(grad_query, scale_ * std::exp(logits[i] - logsumexp) * (dot(grad, value(seen[i])) - delta), key(seen[i]));
    }
    compare[2](row(t_.grad_query, token, problem_.head_dim), grad_query);
  }

  /// Takes output and logsumexp of the queries from the engine: `check_query` answers for those.
  void check_key(std::int64_t token, std::array<Compare, 5>& compare) const {
    const Row k = key(token), v = value(token);
    Row grad_key(k.size()), grad_value(v.size());
    for (std::int64_t i = 0; i < problem_.queries(); ++i) {
      if (!sees(i, token)) continue;
      const Row q = query(i), grad = grad_output(i);
      const double p = std::exp(scale_ * dot(q, k) - row(t_.logsumexp, i, 1)[0]);
      const double delta = dot(grad, row(t_.output, i, problem_.head_dim_v));
      add(grad_value, p, grad);
      add(grad_key, scale_ * p * (dot(grad, v) - delta), q);
    }
    compare[3](row(t_.grad_key, token, problem_.head_dim), grad_key);
    compare[4](row(t_.grad_value, token, problem_.head_dim_v), grad_value);
  }

 private:
  bool sees(std::int64_t query, std::int64_t key) const {
    for (int axis = problem_.rank() - 1; axis >= 0; --axis) {
      const auto& a = axes_[static_cast<std::size_t>(axis)];
      if (!geometry::window(a, static_cast<int>(query % a.queries)).contains(static_cast<int>(key % a.keys)))
        return false;
      query /= a.queries;
      key /= a.keys;
    }
    return true;
  }

  const Problem& problem_;
  const ProblemTensors& t_;
  std::int64_t batch_, head_;
  double scale_;
  std::vector<geometry::Axis> axes_;
};

/// Rounding of the stored results and of sums in the arithmetic of `dtype`, with room for sums of thousands of terms. A
/// key too many or too few moves a result by more than any of them.
double tolerance(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 1e-11;
    case DType::float32:
      return 1e-4;
    case DType::bfloat16:
      return 3e-2;
    case DType::float16:
      return 4e-3;
  }
  return 0;
}

}  // namespace

std::string CheckErrors::complaint(DType dtype) const {
  std::string text;
  for (const auto& [name, error] :
       {std::pair("output", output), std::pair("logsumexp", logsumexp), std::pair("grad_query", grad_query),
        std::pair("grad_key", grad_key), std::pair("grad_value", grad_value)}) {
    if (error <= tolerance(dtype)) continue;
    text += (text.empty() ? "" : ", ") + std::string(name) + " is off by " + std::to_string(error) +
            " of its largest value";
  }
  return text;
}

CheckErrors sampled_check(const Problem& problem, const ProblemTensors& tensors, int samples, bool backward) {
  std::mt19937_64 generator(5);
  std::array<Compare, 5> compare;
  const std::int64_t tokens = problem.queries();
  for (int i = 0; i < samples; ++i) {
    const auto pick = [&](std::int64_t n) {
      return static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(n));
    };
    const Slice slice(problem, tensors, pick(problem.batch), pick(problem.heads));
    // First and last token are always there: edges are where windows shift.
    const std::int64_t token = i == 0 ? 0 : i == 1 ? tokens - 1 : pick(tokens);
    slice.check_query(token, compare, backward);
    if (backward) slice.check_key(token, compare);
  }
  return {compare[0].relative(), compare[1].relative(), compare[2].relative(), compare[3].relative(),
          compare[4].relative()};
}

}  // namespace vicus::bench
