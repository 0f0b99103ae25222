#include "cli/denoise_nlm.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <thread>
#include <utility>

#include "vicus/attention.h"
#include "vicus/error.h"
#include "vicus/info.h"

namespace vicus::cli {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// NumPy's 'reflect': the border sample is the mirror and is not repeated.
std::int64_t reflect(std::int64_t i, std::int64_t length) {
  if (length == 1) return 0;
  const std::int64_t period = 2 * (length - 1);
  const std::int64_t r = ((i % period) + period) % period;
  return r < length ? r : period - r;
}

/// Calls work(i) for every i < count on several threads.
template <class Work>
void parallel_rows(std::int64_t count, int threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto loop = [&] {
    for (std::int64_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> helpers;
  for (int t = 1; t < threads; ++t) helpers.emplace_back(loop);
  loop();
  for (std::thread& helper : helpers) helper.join();
}

/// Memory that is written whole before it is read: no time spent on zeros.
template <class T>
std::unique_ptr<T[]> uninitialized(std::int64_t count) {
  return std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(count));
}

/// Square roots of the Gaussian patch weights (deviation (patch - 1) / 4, sum 1) over channels and h^2: a squared
/// difference of features is then the distance itself. [*patch, channels].
std::vector<double> feature_weights(const NonLocalMeans& s, int channels) {
  std::vector<double> weights;
  double sum = 0;
  const auto exponent = [](std::int64_t i, std::int64_t patch) {
    if (patch == 1) return 0.0;
    const double spread = static_cast<double>(patch - 1) / 4;
    const std::int64_t centre = patch / 2;
    const double x = static_cast<double>(i - centre) / spread;
    return x * x / 2;
  };
  for (std::int64_t i = 0; i < s.patch[0]; ++i) {
    for (std::int64_t j = 0; j < s.patch[1]; ++j) {
      for (std::int64_t k = 0; k < s.patch[2]; ++k) {
        const double w = std::exp(-exponent(i, s.patch[0]) - exponent(j, s.patch[1]) - exponent(k, s.patch[2]));
        sum += w;
        weights.insert(weights.end(), static_cast<std::size_t>(channels), w);
      }
    }
  }
  for (double& w : weights) w = std::sqrt(w / (sum * channels)) / s.h;
  return weights;
}

/// Float32 products of features round at |f|^2 * 2^-23; |f|^2 is at most the largest squared deviation over h^2.
DType pick_dtype(const Samples& noisy, const NonLocalMeans& s) {
  if (s.dtype) return *s.dtype;
  double largest = 0;
  for (std::size_t i = 0; i < noisy.deviation.size(); i += static_cast<std::size_t>(noisy.channels)) {
    double energy = 0;
    for (int c = 0; c < noisy.channels; ++c) {
      const double d = noisy.deviation[i + static_cast<std::size_t>(c)];
      energy += d * d;
    }
    largest = std::max(largest, energy / noisy.channels);
  }
  const double rounding = largest / (s.h * s.h) * std::numeric_limits<float>::epsilon();
  return rounding <= 1e-3 ? DType::float32 : DType::float64;
}

/// How many equal blocks each axis is cut into: the fewest tokens in all, margins counted, that keep a block in memory.
Extent cut(const Extent& extent, const Extent& window, std::int64_t token_bytes, std::size_t memory_bytes) {
  const std::int64_t most = static_cast<std::int64_t>(memory_bytes) / token_bytes;
  const auto tokens = [&](int axis, std::int64_t parts) {
    return (extent[axis] + parts - 1) / parts + window[axis] - 1;
  };
  Extent best{};
  double best_total = std::numeric_limits<double>::infinity();
  for (std::int64_t i = 1; i <= extent[0]; ++i) {
    for (std::int64_t j = 1; j <= extent[1]; ++j) {
      const std::int64_t plane = tokens(0, i) * tokens(1, j);
      const std::int64_t longest = most / plane - (window[2] - 1);
      if (longest < 1) continue;
      const std::int64_t k = (extent[2] + longest - 1) / longest;
      const double total = static_cast<double>(i * j * k) * static_cast<double>(plane * tokens(2, k));
      if (total < best_total) {
        best = {i, j, k};
        best_total = total;
      }
      if (k == 1) break;  // more parts on this axis only add margins
    }
  }
  if (best[0] == 0) {
    const std::int64_t least = window[0] * window[1] * window[2] * token_bytes;
    throw InvalidArgument("--memory", std::to_string(memory_bytes >> 20) + " MiB",
                          "at least " + std::to_string((least >> 20) + 1) + " MiB for this window and patch");
  }
  return best;
}

template <class T>
class Denoiser {
 public:
  Denoiser(const Samples& noisy, const NonLocalMeans& settings, DenoiseReport& report)
      : noisy_(noisy),
        settings_(settings),
        report_(report),
        features_(volume(settings.patch) * noisy.channels),
        head_dim_(features_ + 1),
        threads_(settings.threads > 0 ? settings.threads : default_threads()) {
    const std::vector<double> weights = feature_weights(settings, noisy.channels);
    weights_.assign(weights.begin(), weights.end());
  }

  Samples run() {
    Samples result = noisy_;
    const Extent& extent = noisy_.extent;
    const std::int64_t token_bytes = (2 * head_dim_ + 2 * noisy_.channels) * static_cast<std::int64_t>(sizeof(T));
    const Extent parts = cut(extent, settings_.window, token_bytes, settings_.memory_bytes);
    report_.head_dim = head_dim_;
    report_.blocks = volume(parts);
    report_.pairs = 1;
    for (int a = 0; a < 3; ++a) {
      report_.block[a] = (extent[a] + parts[a] - 1) / parts[a];
      double axis_pairs = 0;
      for (std::int64_t p = 0; p < extent[a]; ++p) {
        const std::int64_t half = settings_.window[a] / 2;
        axis_pairs += static_cast<double>(std::min(p + half, extent[a] - 1) - std::max<std::int64_t>(p - half, 0) + 1);
      }
      report_.pairs *= axis_pairs;
    }
    report_.flops = report_.pairs * 2 * static_cast<double>(head_dim_ + noisy_.channels);

    Extent largest;
    for (int a = 0; a < 3; ++a) largest[a] = report_.block[a] + settings_.window[a] - 1;
    query_ = uninitialized<T>(volume(largest) * head_dim_);
    key_ = uninitialized<T>(volume(largest) * head_dim_);
    value_ = uninitialized<T>(volume(largest) * noisy_.channels);
    output_ = uninitialized<T>(volume(largest) * noisy_.channels);

    std::int64_t done = 0;
    for (std::int64_t i = 0; i < parts[0]; ++i) {
      for (std::int64_t j = 0; j < parts[1]; ++j) {
        for (std::int64_t k = 0; k < parts[2]; ++k) {
          const Extent index{i, j, k};
          Extent begin, size;
          for (int a = 0; a < 3; ++a) {
            begin[a] = extent[a] * index[a] / parts[a];
            size[a] = extent[a] * (index[a] + 1) / parts[a] - begin[a];
          }
          block(begin, size, result);
          if (settings_.progress) settings_.progress(static_cast<double>(++done) / static_cast<double>(report_.blocks));
        }
      }
    }
    return result;
  }

 private:
  /// Denoises the pixels [begin, begin + size).
  void block(const Extent& begin, const Extent& size, Samples& result) {
    Extent tokens;
    for (int a = 0; a < 3; ++a) tokens[a] = size[a] + settings_.window[a] - 1;
    auto start = Clock::now();
    fill(begin, tokens);
    report_.feature_seconds += seconds_since(start);

    const Plan& plan = plan_for(tokens);
    std::vector<std::int64_t> shape{1};
    shape.insert(shape.end(), tokens.end() - noisy_.rank, tokens.end());
    shape.push_back(1);
    const auto layout = [&](std::int64_t dim) {
      std::vector<std::int64_t> whole = shape;
      whole.push_back(dim);
      return TensorLayout(whole);
    };
    AttentionInputs inputs;
    inputs.query = {query_.get(), report_.dtype, layout(head_dim_)};
    inputs.key = {key_.get(), report_.dtype, layout(head_dim_)};
    inputs.value = {value_.get(), report_.dtype, layout(noisy_.channels)};
    start = Clock::now();
    forward(plan, inputs, {output_.get(), report_.dtype, layout(noisy_.channels)});
    report_.attention_seconds += seconds_since(start);
    report_.tile_pairs += plan.forward.work.tile_pairs > 0 ? plan.forward.work.tile_pairs : plan.mask_pairs;

    const std::int64_t row = size[2] * noisy_.channels;
    for (std::int64_t i = 0; i < size[0]; ++i) {
      for (std::int64_t j = 0; j < size[1]; ++j) {
        const std::int64_t from =
            at(tokens, i + settings_.window[0] / 2, j + settings_.window[1] / 2, settings_.window[2] / 2) *
            noisy_.channels;
        const std::int64_t to = at(noisy_.extent, begin[0] + i, begin[1] + j, begin[2]) * noisy_.channels;
        for (std::int64_t x = 0; x < row; ++x) {
          result.deviation[static_cast<std::size_t>(to + x)] = static_cast<float>(output_[from + x]);
        }
      }
    }
  }

  static std::int64_t at(const Extent& e, std::int64_t i, std::int64_t j, std::int64_t k) {
    return (i * e[1] + j) * e[2] + k;
  }

  /// Features of the tokens around the block that begins at `begin`. Token t is pixel begin + t - window / 2.
  void fill(const Extent& begin, const Extent& tokens) {
    Extent around, first;  // pixels the patches reach, reflected at the borders
    std::array<std::vector<std::int64_t>, 3> source;
    for (int a = 0; a < 3; ++a) {
      first[a] = begin[a] - settings_.window[a] / 2;
      around[a] = tokens[a] + settings_.patch[a] - 1;
      for (std::int64_t i = 0; i < around[a]; ++i) {
        source[a].push_back(reflect(first[a] - settings_.patch[a] / 2 + i, noisy_.extent[a]));
      }
    }
    const int channels = noisy_.channels;
    const std::int64_t line = around[2] * channels;
    around_.resize(static_cast<std::size_t>(around[0] * around[1] * line));
    parallel_rows(around[0] * around[1], threads_, [&](std::int64_t row) {
      T* to = around_.data() + row * line;
      const float* from =
          noisy_.deviation.data() + at(noisy_.extent, source[0][static_cast<std::size_t>(row / around[1])],
                                       source[1][static_cast<std::size_t>(row % around[1])], 0) *
                                        channels;
      for (std::int64_t k = 0; k < around[2]; ++k) {
        const float* pixel = from + source[2][static_cast<std::size_t>(k)] * channels;
        for (int c = 0; c < channels; ++c) *to++ = pixel[c];
      }
    });
    parallel_rows(tokens[0] * tokens[1], threads_, [&](std::int64_t row) {
      const std::int64_t i = row / tokens[1], j = row % tokens[1];
      const bool inside = contains(0, first[0] + i) && contains(1, first[1] + j);
      for (std::int64_t k = 0; k < tokens[2]; ++k) {
        const std::int64_t token = at(tokens, i, j, k);
        if (inside && contains(2, first[2] + k)) {
          pixel_token(around, i, j, k, token);
        } else {
          margin_token(token);
        }
      }
    });
  }

  [[nodiscard]] bool contains(int axis, std::int64_t p) const { return p >= 0 && p < noisy_.extent[axis]; }

  void pixel_token(const Extent& around, std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t token) {
    const Extent& patch = settings_.patch;
    const int channels = noisy_.channels;
    const std::int64_t run = patch[2] * channels;
    T* query = query_.get() + token * head_dim_;
    T* key = key_.get() + token * head_dim_;
    const T* weight = weights_.data();
    constexpr int kLanes = 8;  // independent sums, which the compiler may keep in a vector
    double norm[kLanes] = {};
    for (std::int64_t a = 0; a < patch[0]; ++a) {
      for (std::int64_t b = 0; b < patch[1]; ++b) {
        const T* pixels = around_.data() + at(around, i + a, j + b, k) * channels;
        for (std::int64_t x = 0; x < run; ++x) {
          const T f = pixels[x] * weight[x];
          key[x] = f;
          query[x] = 2 * f;
          norm[x % kLanes] += static_cast<double>(f) * static_cast<double>(f);
        }
        weight += run;
        key += run;
        query += run;
      }
    }
    double sum = 0;
    for (const double part : norm) sum += part;
    *key = static_cast<T>(sum);
    *query = -1;
    const T* centre = around_.data() + at(around, i + patch[0] / 2, j + patch[1] / 2, k + patch[2] / 2) * channels;
    std::copy_n(centre, channels, value_.get() + token * channels);
  }

  /// A key of weight 0 to every query. The token's own result is not used.
  void margin_token(std::int64_t token) {
    constexpr T kFar = static_cast<T>(1e30);  // its logit, -1e30, is finite and its exponential 0 beside any pixel's
    std::fill_n(query_.get() + token * head_dim_, head_dim_, T{0});
    std::fill_n(key_.get() + token * head_dim_, features_, T{0});
    key_[token * head_dim_ + features_] = kFar;
    std::fill_n(value_.get() + token * noisy_.channels, noisy_.channels, T{0});
  }

  const Plan& plan_for(const Extent& tokens) {
    const auto known = plans_.find(tokens);
    if (known != plans_.end()) return known->second;
    const auto axes = [&](const Extent& e) { return std::span(e).last(static_cast<std::size_t>(noisy_.rank)); };
    Problem problem;
    problem.dtype = report_.dtype;
    problem.layout = AxisValues(axes(tokens));
    problem.head_dim = head_dim_;
    problem.head_dim_v = noisy_.channels;
    problem.scale = 1.0;
    Neighborhood mask;
    mask.kernel_size = AxisValues(axes(settings_.window));
    problem.mask = mask;
    PlanOptions options;
    options.engine = settings_.engine;
    options.threads = settings_.threads;
    const Plan& plan = plans_.emplace(tokens, choose_plan(problem, options)).first->second;
    report_.engine = plan.engine;
    report_.engine_reason = plan.reason;
    report_.threads = plan.threads;
    return plan;
  }

  const Samples& noisy_;
  const NonLocalMeans& settings_;
  DenoiseReport& report_;
  std::int64_t features_, head_dim_;
  int threads_;
  std::vector<T> weights_, around_;
  std::unique_ptr<T[]> query_, key_, value_, output_;
  std::map<Extent, Plan> plans_;
};

}  // namespace

template <class T>
Samples Samples::of(int rank, const Extent& extent, int channels, const T* values) {
  Samples s;
  s.rank = rank;
  s.extent = extent;
  s.channels = channels;
  const std::int64_t tokens = volume(extent);
  s.mean.assign(static_cast<std::size_t>(channels), 0.0);
  for (std::int64_t i = 0; i < tokens * channels; ++i) {
    s.mean[static_cast<std::size_t>(i % channels)] += static_cast<double>(values[i]);
  }
  for (double& m : s.mean) m /= static_cast<double>(std::max<std::int64_t>(tokens, 1));
  s.deviation.resize(static_cast<std::size_t>(tokens * channels));
  for (std::int64_t i = 0; i < tokens * channels; ++i) {
    s.deviation[static_cast<std::size_t>(i)] =
        static_cast<float>(static_cast<double>(values[i]) - s.mean[static_cast<std::size_t>(i % channels)]);
  }
  return s;
}
template Samples Samples::of(int, const Extent&, int, const float*);
template Samples Samples::of(int, const Extent&, int, const double*);
template Samples Samples::of(int, const Extent&, int, const std::uint8_t*);
template Samples Samples::of(int, const Extent&, int, const std::uint16_t*);

Samples non_local_means(const Samples& noisy, const NonLocalMeans& settings, DenoiseReport* report) {
  DenoiseReport unused;
  DenoiseReport& r = report != nullptr ? *report : unused;
  r = {};
  r.dtype = pick_dtype(noisy, settings);
  if (r.dtype == DType::float64) return Denoiser<double>(noisy, settings, r).run();
  return Denoiser<float>(noisy, settings, r).run();
}

}  // namespace vicus::cli
