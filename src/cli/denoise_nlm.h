// Non-local means as neighborhood attention.
//
// Non-local means makes pixel i sum_j w_ij v_j / sum_j w_ij over the window around i; w_ij = exp(-d_ij) and d_ij is
// the Gaussian-weighted mean squared difference of the patches around i and j, over h^2. With the square roots of the
// patch weights folded into features f, d_ij = |f_i|^2 - 2 f_i . f_j + |f_j|^2, and |f_i|^2 cancels in the quotient:
//
//   query (2 f_i, -1), key (f_j, |f_j|^2), value v_j, scale 1:  softmax over the window = w_ij / sum_j w_ij.
//
// The window of non-local means is clipped at the borders, that of neighborhood attention shifts inward. So every
// token grid gets a margin of half a window, whose keys are so far away that their weight is exactly 0.
#ifndef VICUS_CLI_DENOISE_NLM_H_
#define VICUS_CLI_DENOISE_NLM_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "vicus/plan.h"

namespace vicus::cli {

/// Always three axes, unused leading ones of length one.
using Extent = std::array<std::int64_t, 3>;

[[nodiscard]] constexpr std::int64_t volume(const Extent& e) noexcept { return e[0] * e[1] * e[2]; }

/// A signal, picture or stack of frames. Samples are kept as differences from their channel's mean: products of
/// features then lose fewest digits, and an offset (a clock, a bias) costs none.
struct Samples {
  int rank = 2;  ///< axes in use, the trailing ones: 1 signal, 2 picture, 3 frames
  Extent extent{1, 1, 1};
  int channels = 1;
  std::vector<double> mean;      ///< per channel
  std::vector<float> deviation;  ///< [*extent, channels]

  /// Of [*extent, channels] values.
  template <class T>
  static Samples of(int rank, const Extent& extent, int channels, const T* values);
  /// Value `i` of [*extent, channels].
  [[nodiscard]] double value(std::size_t i) const {
    return mean[i % static_cast<std::size_t>(channels)] + static_cast<double>(deviation[i]);
  }
};

struct NonLocalMeans {
  Extent window{1, 1, 1};      ///< odd; 1 on unused axes
  Extent patch{1, 1, 1};       ///< odd; 1 on unused axes
  double h = 0;                ///< > 0, in the units of the samples
  std::optional<DType> dtype;  ///< unset: float32 while its rounding moves no weight by more than 1e-3, else float64
  Engine engine = Engine::automatic;
  int threads = 0;
  std::size_t memory_bytes = std::size_t{512} << 20;  ///< for features, values and results of one block
  std::function<void(double)> progress;               ///< called with the share done
};

struct DenoiseReport {
  double feature_seconds = 0, attention_seconds = 0;
  double pairs = 0;       ///< pairs of pixels of non-local means itself: windows clipped, margins not counted
  double tile_pairs = 0;  ///< pairs the engine computed
  double flops = 0;       ///< of `pairs`
  std::int64_t blocks = 0;
  Extent block{1, 1, 1};  ///< pixels of the largest block
  std::int64_t head_dim = 0;
  DType dtype = DType::float32;
  Engine engine = Engine::cpu;
  std::string engine_reason;
  int threads = 1;
};

/// Denoises in blocks of bounded memory; the result does not depend on them beyond rounding.
/// Throws InvalidArgument naming "--memory" when the bound is too small for a single window.
[[nodiscard]] Samples non_local_means(const Samples& noisy, const NonLocalMeans& settings,
                                      DenoiseReport* report = nullptr);

}  // namespace vicus::cli

#endif  // VICUS_CLI_DENOISE_NLM_H_
