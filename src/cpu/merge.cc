// Merging of partial attentions. Bound by memory: one pass over the parts, rows shared among the threads.
//
// Backward, with w_i = exp(lse_i - lse), o = sum w_i o_i, g = do . o:
//   do_i = w_i do,   dlse_i = w_i (do . o_i - g + dlse)
#include "core/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/numbers.h"
#include "cpu/parallel.h"

namespace vicus::cpu {
namespace {

class Parts : public MergeParts {
 public:
  explicit Parts(const MergeParts& parts) : MergeParts(parts) {}

  // Offset of row `r` in a tensor of either shape.
  [[nodiscard]] std::int64_t offset(const TensorLayout& t, std::int64_t r) const {
    const std::span<const std::int64_t> shape = row_shape();
    std::int64_t sum = 0;
    for (std::size_t i = shape.size(); i-- > 0;) {
      sum += r % shape[i] * t.stride(static_cast<int>(i));
      r /= shape[i];
    }
    return sum;
  }

  // Weights of row `r`; returns its logsumexp. Parts that saw nothing get 0.
  double weights(std::int64_t r, double* weight) const {
    double top = -std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < count(); ++i) {
      weight[i] = load_element(logsumexps[i].data(), logsumexps[i].dtype(), offset(logsumexps[i], r));
      if (std::isnan(weight[i]) || weight[i] > top) top = weight[i];
      if (std::isnan(top)) break;
    }
    if (std::isnan(top)) {
      for (std::size_t i = 0; i < count(); ++i) weight[i] = top;
      return top;
    }
    if (top == -std::numeric_limits<double>::infinity()) {
      for (std::size_t i = 0; i < count(); ++i) weight[i] = 0;
      return top;
    }
    double sum = 0;
    for (std::size_t i = 0; i < count(); ++i) sum += weight[i] = std::exp(weight[i] - top);
    for (std::size_t i = 0; i < count(); ++i) weight[i] /= sum;
    return top + std::log(sum);
  }

  [[nodiscard]] double value(std::size_t part, std::int64_t row_offset, std::int64_t f) const {
    return load_element(outputs[part].data(), dtype(), row_offset + f);
  }
};

// Rows in pieces, each with scratch for `doubles` numbers.
template <class EachRow>
void for_each_row(const Parts& parts, std::size_t doubles, const EachRow& each) {
  constexpr std::int64_t kPiece = 256;
  const std::int64_t pieces = (parts.rows() + kPiece - 1) / kPiece;
  parallel_tasks(max_threads(), pieces, doubles * sizeof(double), [&](std::int64_t piece, std::byte* scratch) {
    for (std::int64_t r = piece * kPiece; r < std::min((piece + 1) * kPiece, parts.rows()); ++r) {
      each(r, reinterpret_cast<double*>(scratch));
    }
  });
}

void forward(const MergeParts& merged, const TensorView& output, const TensorView& logsumexp, void* /*stream*/) {
  const Parts parts(merged);
  const auto width = static_cast<std::size_t>(parts.width());
  for_each_row(parts, parts.count() + width, [&](std::int64_t r, double* weight) {
    double* const sum = weight + parts.count();
    const double lse = parts.weights(r, weight);
    std::fill_n(sum, width, 0.0);
    for (std::size_t i = 0; i < parts.count(); ++i) {
      if (weight[i] == 0) continue;  // whatever that output holds
      const std::int64_t row = parts.offset(parts.outputs[i], r);
      for (std::size_t f = 0; f < width; ++f) sum[f] += weight[i] * parts.value(i, row, static_cast<std::int64_t>(f));
    }
    const std::int64_t out = parts.offset(output, r);
    for (std::size_t f = 0; f < width; ++f) {
      store_element(output.data(), output.dtype(), out + static_cast<std::int64_t>(f), sum[f]);
    }
    if (logsumexp) store_element(logsumexp.data(), logsumexp.dtype(), parts.offset(logsumexp, r), lse);
  });
}

void backward(const MergeParts& merged, const ConstTensorView& grad_output, const ConstTensorView& grad_logsumexp,
              const MergeGradients& gradients, void* /*stream*/) {
  const Parts parts(merged);
  const std::int64_t width = parts.width();
  for_each_row(parts, 2 * parts.count(), [&](std::int64_t r, double* weight) {
    double* const dot = weight + parts.count();  // do . o_i
    parts.weights(r, weight);
    const std::int64_t grad_row = parts.offset(grad_output, r);
    const auto grad = [&](std::int64_t f) {
      return load_element(grad_output.data(), grad_output.dtype(), grad_row + f);
    };
    double total = 0;  // do . o
    for (std::size_t i = 0; i < parts.count(); ++i) {
      dot[i] = 0;
      if (weight[i] == 0) continue;
      const std::int64_t row = parts.offset(parts.outputs[i], r);
      for (std::int64_t f = 0; f < width; ++f) dot[i] += grad(f) * parts.value(i, row, f);
      total += weight[i] * dot[i];
    }
    const double grad_lse =
        grad_logsumexp ? load_element(grad_logsumexp.data(), grad_logsumexp.dtype(), parts.offset(grad_logsumexp, r))
                       : 0.0;
    for (std::size_t i = 0; i < parts.count(); ++i) {
      const double w = weight[i];
      if (!gradients.outputs.empty() && gradients.outputs[i]) {
        const std::int64_t row = parts.offset(gradients.outputs[i], r);
        for (std::int64_t f = 0; f < width; ++f) {
          store_element(gradients.outputs[i].data(), parts.dtype(), row + f, w == 0 ? 0.0 : w * grad(f));
        }
      }
      if (!gradients.logsumexps.empty() && gradients.logsumexps[i]) {
        const TensorView& t = gradients.logsumexps[i];
        store_element(t.data(), t.dtype(), parts.offset(t, r), w == 0 ? 0.0 : w * (dot[i] - total + grad_lse));
      }
    }
  });
}

}  // namespace

const MergeEngine kMerge = {forward, backward};

}  // namespace vicus::cpu
