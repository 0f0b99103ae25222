// Merging of partial attentions. Bound by memory: one pass over the parts, rows shared among the threads.
//
// Backward, with w_i = exp(lse_i - lse), o = sum w_i o_i, g = do . o:
//   do_i = w_i do,   dlse_i = w_i (do . o_i - g + dlse)
#include "vicus/merge.h"

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/numbers.h"
#include "cpu/parallel.h"
#include "vicus/error.h"

namespace vicus {
namespace {

std::string part_name(std::string list, std::size_t part) {
  list += '[';
  list += std::to_string(part);
  list += ']';
  return list;
}

// The parts of one merge: row r of every tensor is (batch, tokens, head) r of the shape without features.
class Parts {
 public:
  Parts(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps)
      : outputs_(outputs), logsumexps_(logsumexps) {
    if (outputs.empty()) throw InvalidArgument("outputs", "no part", "at least one");
    if (logsumexps.size() != outputs.size()) {
      throw InvalidArgument("logsumexps", std::to_string(logsumexps.size()) + " parts",
                            "as many as outputs: " + std::to_string(outputs.size()));
    }
    require_present("outputs[0]", outputs[0]);
    if (outputs[0].dims() < 4) {
      throw InvalidArgument("outputs[0].shape", shape_text(outputs[0]),
                            "[batch, 1 to 3 token axes, heads, head_dim_v]");
    }
    shape_.assign(outputs[0].shape().begin(), outputs[0].shape().end());
    row_shape_.assign(shape_.begin(), shape_.end() - 1);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      require_input(part_name("outputs", i), outputs[i], shape_, dtype());
      require_logsumexp(part_name("logsumexps", i), logsumexps[i], row_shape_, dtype(), false);
    }
    for (const std::int64_t extent : row_shape_) rows_ *= extent;
  }

  [[nodiscard]] DType dtype() const { return outputs_[0].dtype(); }
  [[nodiscard]] const std::vector<std::int64_t>& shape() const { return shape_; }
  [[nodiscard]] const std::vector<std::int64_t>& row_shape() const { return row_shape_; }
  [[nodiscard]] std::int64_t rows() const { return rows_; }
  [[nodiscard]] std::int64_t width() const { return shape_.back(); }
  [[nodiscard]] std::size_t count() const { return outputs_.size(); }

  // Offset of row `r` in a tensor of either shape.
  [[nodiscard]] std::int64_t offset(const TensorLayout& t, std::int64_t r) const {
    std::int64_t sum = 0;
    for (std::size_t i = row_shape_.size(); i-- > 0;) {
      sum += r % row_shape_[i] * t.stride(static_cast<int>(i));
      r /= row_shape_[i];
    }
    return sum;
  }

  // Weights of row `r`; returns its logsumexp. Parts that saw nothing get 0.
  double weights(std::int64_t r, double* weight) const {
    double top = -std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < count(); ++i) {
      weight[i] = load_element(logsumexps_[i].data(), logsumexps_[i].dtype(), offset(logsumexps_[i], r));
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
    return load_element(outputs_[part].data(), dtype(), row_offset + f);
  }
  [[nodiscard]] const ConstTensorView& output(std::size_t part) const { return outputs_[part]; }

 private:
  std::span<const ConstTensorView> outputs_, logsumexps_;
  std::vector<std::int64_t> shape_, row_shape_;
  std::int64_t rows_ = 1;
};

// Rows in pieces, each with scratch for `doubles` numbers.
template <class EachRow>
void for_each_row(const Parts& parts, std::size_t doubles, const EachRow& each) {
  constexpr std::int64_t kPiece = 256;
  const std::int64_t pieces = (parts.rows() + kPiece - 1) / kPiece;
  cpu::parallel_tasks(cpu::max_threads(), pieces, doubles * sizeof(double),
                      [&](std::int64_t piece, std::byte* scratch) {
                        for (std::int64_t r = piece * kPiece; r < std::min((piece + 1) * kPiece, parts.rows()); ++r) {
                          each(r, reinterpret_cast<double*>(scratch));
                        }
                      });
}

}  // namespace

void merge_forward(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps,
                   const TensorView& output, const TensorView& logsumexp) {
  const Parts parts(outputs, logsumexps);
  require_output("output", output, parts.shape(), parts.dtype());
  if (logsumexp) require_logsumexp("logsumexp", logsumexp, parts.row_shape(), parts.dtype(), true);
  const auto width = static_cast<std::size_t>(parts.width());
  for_each_row(parts, parts.count() + width, [&](std::int64_t r, double* weight) {
    double* const sum = weight + parts.count();
    const double lse = parts.weights(r, weight);
    std::fill_n(sum, width, 0.0);
    for (std::size_t i = 0; i < parts.count(); ++i) {
      if (weight[i] == 0) continue;  // whatever that output holds
      const std::int64_t row = parts.offset(parts.output(i), r);
      for (std::size_t f = 0; f < width; ++f) sum[f] += weight[i] * parts.value(i, row, static_cast<std::int64_t>(f));
    }
    const std::int64_t out = parts.offset(output, r);
    for (std::size_t f = 0; f < width; ++f) {
      store_element(output.data(), output.dtype(), out + static_cast<std::int64_t>(f), sum[f]);
    }
    if (logsumexp) store_element(logsumexp.data(), logsumexp.dtype(), parts.offset(logsumexp, r), lse);
  });
}

void merge_backward(std::span<const ConstTensorView> outputs, std::span<const ConstTensorView> logsumexps,
                    const ConstTensorView& grad_output, const ConstTensorView& grad_logsumexp,
                    std::span<const TensorView> grad_outputs, std::span<const TensorView> grad_logsumexps) {
  const Parts parts(outputs, logsumexps);
  require_input("grad_output", grad_output, parts.shape(), parts.dtype());
  if (grad_logsumexp) require_logsumexp("grad_logsumexp", grad_logsumexp, parts.row_shape(), parts.dtype(), false);
  const auto check_count = [&](const char* name, std::size_t got) {
    if (got != 0 && got != parts.count()) {
      throw InvalidArgument(name, std::to_string(got) + " parts",
                            "none, or as many as outputs: " + std::to_string(parts.count()));
    }
  };
  check_count("grad_outputs", grad_outputs.size());
  check_count("grad_logsumexps", grad_logsumexps.size());
  for (std::size_t i = 0; i < parts.count(); ++i) {
    if (!grad_outputs.empty() && grad_outputs[i]) {
      require_output(part_name("grad_outputs", i), grad_outputs[i], parts.shape(), parts.dtype());
    }
    if (!grad_logsumexps.empty() && grad_logsumexps[i]) {
      require_logsumexp(part_name("grad_logsumexps", i), grad_logsumexps[i], parts.row_shape(), parts.dtype(), true);
    }
  }
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
      const std::int64_t row = parts.offset(parts.output(i), r);
      for (std::int64_t f = 0; f < width; ++f) dot[i] += grad(f) * parts.value(i, row, f);
      total += weight[i] * dot[i];
    }
    const double grad_lse =
        grad_logsumexp ? load_element(grad_logsumexp.data(), grad_logsumexp.dtype(), parts.offset(grad_logsumexp, r))
                       : 0.0;
    for (std::size_t i = 0; i < parts.count(); ++i) {
      const double w = weight[i];
      if (!grad_outputs.empty() && grad_outputs[i]) {
        const std::int64_t row = parts.offset(grad_outputs[i], r);
        for (std::int64_t f = 0; f < width; ++f) {
          store_element(grad_outputs[i].data(), parts.dtype(), row + f, w == 0 ? 0.0 : w * grad(f));
        }
      }
      if (!grad_logsumexps.empty() && grad_logsumexps[i]) {
        const TensorView& t = grad_logsumexps[i];
        store_element(t.data(), t.dtype(), parts.offset(t, r), w == 0 ? 0.0 : w * (dot[i] - total + grad_lse));
      }
    }
  });
}

}  // namespace vicus
