// What the user asks for: shapes, types and the mask, without data. A Problem is checked once, by `validate`, and every
// rule on arguments lives there; a Plan (plan.h) holds a checked Problem.
//
// Names. B batch, X token layout ((L), (H, W) or (T, H, W); (Sq) for dense attention), H query heads, Hkv key/value
// heads, D head_dim, Dv head_dim_v, T additional tokens, Sk keys of dense attention.
#ifndef VICUS_PROBLEM_H_
#define VICUS_PROBLEM_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "vicus/export.h"
#include "vicus/tensor.h"

namespace vicus {

/// One integer per token axis, or one for all of them: `7` and `{7, 7}` both set a 2-D window.
class VICUS_API AxisValues {
 public:
  AxisValues() = default;
  AxisValues(std::int64_t for_all) : size_(1), value_{for_all} {}  // NOLINT(google-explicit-constructor)
  AxisValues(std::initializer_list<std::int64_t> values) : AxisValues(std::span(values.begin(), values.size())) {}
  /// Throws InvalidArgument on more than three values.
  explicit AxisValues(std::span<const std::int64_t> values);

  [[nodiscard]] int size() const noexcept { return size_; }
  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
  /// Value of `axis`; a single value answers for every axis.
  [[nodiscard]] std::int64_t operator[](int axis) const noexcept {
    return value_[size_ == 1 ? 0U : static_cast<std::size_t>(axis)];
  }
  /// "(7, 7)".
  [[nodiscard]] std::string text() const;
  friend bool operator==(const AxisValues&, const AxisValues&) = default;

 private:
  int size_ = 0;
  std::array<std::int64_t, 3> value_{};
};

/// Neighborhood attention (NATTEN's field): each axis has a window, see geometry.h for the definition. No value may
/// exceed 2^29.
struct Neighborhood {
  AxisValues kernel_size;    ///< Window, >= 1. A window longer than its axis (or residue class) is the whole of it.
  AxisValues stride = 1;     ///< 1 <= stride <= kernel_size: queries that share a window.
  AxisValues dilation = 1;   ///< >= 1: tokens see only tokens of their own residue class.
  AxisValues is_causal = 0;  ///< 0 or 1: keys after the query are not seen.
  friend bool operator==(const Neighborhood&, const Neighborhood&) = default;
};

enum class Causal : std::uint8_t {
  none,
  top_left,      ///< key j <= query i (NATTEN, Transformer Engine 'causal')
  bottom_right,  ///< key j <= query i + Sk - Sq (FlashAttention)
};

/// Lengths that only a call knows: its AttentionInputs hold the lists, in memory of the GPU. A plan knows these bounds and
/// no list, so it serves every batch within them, and a CUDA graph replays with whatever the lists then hold. For engine
/// sm80.
///
/// Lists keep the rules of the lists in `Dense`, with two freedoms: packed sequences may end before the tokens do (what
/// follows belongs to no sequence: output 0, logsumexp -inf, gradients 0), and a sequence may be empty. Nobody checks
/// them, as that would wait for the device. Wrong lists make wrong results, but nothing outside the tensors is touched;
/// of a sequence longer than its bound the rest may be left unwritten.
struct DeviceLengths {
  std::int64_t sequences = 0;    ///< packed sequences; 0: not packed
  std::int64_t max_queries = 0;  ///< of the longest packed sequence, at most the queries there are
  std::int64_t max_keys = 0;     ///< the same for keys
  bool key_lengths = false;      ///< key padding; not with packed sequences
  [[nodiscard]] bool any() const noexcept { return sequences > 0 || key_lengths; }
  friend bool operator==(const DeviceLengths&, const DeviceLengths&) = default;
};

/// Dense (flash) attention, possibly causal, within a sliding window, over padded or packed sequences.
struct Dense {
  std::int64_t keys = 0;  ///< Sk. With packed sequences the total number of keys.
  Causal causal = Causal::none;
  /// Sliding window: keys [i + o - left, i + o + right], -1 for no bound; o is 0 for `top_left`, otherwise Sk - Sq.
  /// A causal mask sees nothing to the right: window_right must then be -1 or 0.
  std::int64_t window_left = -1, window_right = -1;
  /// Keys of each batch entry that are real (key padding), each in 0..keys; empty when all are. `bottom_right` and the
  /// sliding window then count from the entry's own length.
  std::vector<std::int64_t> key_lengths = {};
  /// Packed variable-length sequences: batch is 1, sequence s holds queries [cq[s], cq[s + 1]) and keys
  /// [ck[s], ck[s + 1]); both lists start at 0, never decrease and end at the totals. Empty when not packed.
  std::vector<std::int64_t> cumulative_queries = {}, cumulative_keys = {};
  /// In place of these three lists: lengths that come with each call.
  DeviceLengths device = {};

  [[nodiscard]] bool packed() const noexcept { return !cumulative_queries.empty() || device.sequences > 0; }
  [[nodiscard]] bool padded() const noexcept { return !key_lengths.empty() || device.key_lengths; }
  /// Packed sequences, 0 when not packed.
  [[nodiscard]] std::int64_t sequences() const noexcept {
    return cumulative_queries.empty() ? device.sequences : static_cast<std::int64_t>(cumulative_queries.size()) - 1;
  }
  friend bool operator==(const Dense&, const Dense&) = default;
};

struct VICUS_API Problem {
  DType dtype = DType::float32;  ///< of query, key, value, output and their gradients
  std::int64_t batch = 1;        ///< >= 0; empty problems are legal and write nothing
  AxisValues layout;             ///< token layout of the queries
  std::int64_t heads = 1;
  std::int64_t heads_kv = 0;  ///< divides heads; 0 means heads. Query head h reads key head h / (heads / heads_kv).
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;         ///< 0 means head_dim
  std::optional<double> scale;         ///< of the logits; unset means head_dim ** -0.5, an explicit 0 is a 0
  std::int64_t additional_tokens = 0;  ///< keys and values that every query sees, in the same softmax
  bool rpb = false;                    ///< relative positional bias [H, 2 * w0 - 1, ...] (neighborhood only)
  bool attn_bias = false;              ///< additive mask [B or 1, H or 1, Sq, Sk] (dense, not packed); -inf hides a key
  std::variant<Neighborhood, Dense> mask;

  [[nodiscard]] int rank() const noexcept { return layout.size(); }
  [[nodiscard]] bool dense() const noexcept { return std::holds_alternative<Dense>(mask); }
  /// Query tokens of one batch entry: the product of `layout`.
  [[nodiscard]] std::int64_t queries() const noexcept;
  /// Key tokens of one batch entry, additional tokens not counted.
  [[nodiscard]] std::int64_t keys() const noexcept;
  /// The factor the logits are multiplied by.
  [[nodiscard]] double effective_scale() const noexcept;

  /// Shapes of the tensors. Dense: X is (Sq) or (Sk).
  [[nodiscard]] std::vector<std::int64_t> query_shape() const;              ///< [B, *X, H, D]
  [[nodiscard]] std::vector<std::int64_t> key_shape() const;                ///< [B, *X, Hkv, D]
  [[nodiscard]] std::vector<std::int64_t> value_shape() const;              ///< [B, *X, Hkv, Dv]
  [[nodiscard]] std::vector<std::int64_t> output_shape() const;             ///< [B, *X, H, Dv]
  [[nodiscard]] std::vector<std::int64_t> logsumexp_shape() const;          ///< [B, *X, H]
  [[nodiscard]] std::vector<std::int64_t> additional_keys_shape() const;    ///< [B, T, Hkv, D]
  [[nodiscard]] std::vector<std::int64_t> additional_values_shape() const;  ///< [B, T, Hkv, Dv]
  [[nodiscard]] std::vector<std::int64_t> rpb_shape() const;                ///< [H, 2 * w0 - 1, ...]

  friend bool operator==(const Problem&, const Problem&) = default;
};

/// Checks every rule and returns the problem with its defaults filled in (heads_kv, head_dim_v, per-axis values).
/// Throws InvalidArgument naming the argument, its value and what is allowed.
[[nodiscard]] VICUS_API Problem validate(Problem problem);

/// The problem of tensors at hand, neighborhood attention: shapes and dtype come from query, key and value, the rest
/// from `mask`. Absent `additional_keys` and `rpb` mean none. Throws InvalidArgument as `validate` does.
[[nodiscard]] VICUS_API Problem neighborhood_problem(const ConstTensorView& query, const ConstTensorView& key,
                                                     const ConstTensorView& value, const Neighborhood& mask,
                                                     std::optional<double> scale = {},
                                                     const ConstTensorView& additional_keys = {},
                                                     const ConstTensorView& rpb = {});

/// The same for dense attention; `mask.keys` is taken from `key`.
[[nodiscard]] VICUS_API Problem dense_problem(const ConstTensorView& query, const ConstTensorView& key,
                                              const ConstTensorView& value, Dense mask,
                                              std::optional<double> scale = {},
                                              const ConstTensorView& additional_keys = {},
                                              const ConstTensorView& attn_bias = {});

}  // namespace vicus

#endif  // VICUS_PROBLEM_H_
