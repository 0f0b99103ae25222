#include "cli/denoise_filter.h"

#include <algorithm>
#include <cmath>

#include "cli/progress.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

// Defaults by rank: signal, picture, frames.
constexpr Extent kWindow[] = {{1, 1, 255}, {1, 21, 21}, {5, 21, 21}};
constexpr Extent kPatch[] = {{1, 1, 15}, {1, 7, 7}, {1, 7, 7}};

/// h in units of sigma. The rule of thumb of scikit-image's denoise_nl_means is "sigma or slightly less"; on four
/// photographs with two levels of noise (docs/denoise.md) 1.0 stays within 0.5 dB of the best, 0.8 within 2.2 dB.
constexpr double kStrength = 1.0;

std::string text_of(double value) {
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.ends_with('.')) text.pop_back();
  return text;
}

void check_odd(const std::string& argument, const std::vector<std::int64_t>& values) {
  for (const std::int64_t value : values) {
    if (value < 1 || value % 2 == 0 || value > 4095) {
      throw InvalidArgument(argument, std::to_string(value), "odd numbers from 1 to 4095");
    }
  }
  if (values.size() > 3) throw InvalidArgument(argument, std::to_string(values.size()) + " values", "at most 3");
}

void check_positive(const std::string& argument, const std::optional<double>& value) {
  if (value && !(*value > 0 && std::isfinite(*value))) {
    throw InvalidArgument(argument, text_of(*value), "a number greater than 0");
  }
}

/// The values of --window or --patch on the axes in use.
Extent per_axis(const std::string& argument, const std::vector<std::int64_t>& values, int rank,
                const Extent* defaults) {
  if (values.empty()) return defaults[rank - 1];
  if (values.size() != 1 && values.size() != static_cast<std::size_t>(rank)) {
    throw InvalidArgument(
        argument, std::to_string(values.size()) + " values",
        rank == 1 ? "1 value for a signal" : "1 value, or one for each of the " + std::to_string(rank) + " axes");
  }
  Extent extent{1, 1, 1};
  const auto first = extent.end() - rank;
  if (values.size() == 1) {
    std::fill(first, extent.end(), values.front());
  } else {
    std::copy(values.begin(), values.end(), first);
  }
  return extent;
}

}  // namespace

double estimate_noise(const Samples& noisy) {
  const Extent& e = noisy.extent;
  // Frames move, so differences are taken inside each of them: the two trailing axes at most.
  const bool vertical = noisy.rank >= 2 && e[1] >= 3, horizontal = e[2] >= 3;
  if (!vertical && !horizontal) return 0;
  const double norm = (vertical ? std::sqrt(6.0) : 1.0) * (horizontal ? std::sqrt(6.0) : 1.0);
  double variance = 0;
  std::vector<float> response;
  for (int c = 0; c < noisy.channels; ++c) {
    const auto at = [&](std::int64_t i, std::int64_t j, std::int64_t k) {
      return noisy.deviation[static_cast<std::size_t>(((i * e[1] + j) * e[2] + k) * noisy.channels + c)];
    };
    const auto across = [&](std::int64_t i, std::int64_t j, std::int64_t k) {
      return horizontal ? at(i, j, k - 1) - 2 * at(i, j, k) + at(i, j, k + 1) : at(i, j, k);
    };
    response.clear();
    const std::int64_t top = vertical ? 1 : 0, left = horizontal ? 1 : 0;
    for (std::int64_t i = 0; i < e[0]; ++i) {
      for (std::int64_t j = top; j < e[1] - top; ++j) {
        for (std::int64_t k = left; k < e[2] - left; ++k) {
          const float r = vertical ? across(i, j - 1, k) - 2 * across(i, j, k) + across(i, j + 1, k) : across(i, j, k);
          response.push_back(std::abs(r));
        }
      }
    }
    const auto middle = response.begin() + static_cast<std::ptrdiff_t>(response.size() / 2);
    std::nth_element(response.begin(), middle, response.end());
    const double sigma = static_cast<double>(*middle) / (0.6745 * norm);
    variance += sigma * sigma / noisy.channels;
  }
  return std::sqrt(variance);
}

DenoiseFilter::DenoiseFilter(const DenoiseRequest& request, Context& context) : request_(request), context_(context) {
  check_odd("--window", request.window);
  check_odd("--patch", request.patch);
  check_positive("--sigma", request.sigma);
  check_positive("--strength", request.strength);
  constexpr std::int64_t kMostMib = std::int64_t{1} << 24;
  if (request.memory_mib < 1 || request.memory_mib > kMostMib) {
    throw InvalidArgument("--memory", std::to_string(request.memory_mib), "1 to 16777216 (MiB)");
  }
  const PlanOptions plan = make_plan_options(request.engine);
  settings_.threads = plan.threads;
  settings_.engine = plan.engine;
  settings_.memory_bytes = static_cast<std::size_t>(request.memory_mib) << 20;
  if (request.dtype != "auto") {
    if (request.dtype != "float32" && request.dtype != "float64") {
      throw InvalidArgument("--dtype", "'" + request.dtype + "'", "auto, float32 or float64");
    }
    settings_.dtype = parse_dtype(request.dtype, "--dtype");
  }
}

Samples DenoiseFilter::operator()(const Samples& noisy, double unit) {
  if (noisy.deviation.empty()) throw InvalidArgument("input", "empty", "at least one sample");
  if (!std::all_of(noisy.deviation.begin(), noisy.deviation.end(), [](float d) { return std::isfinite(d); })) {
    throw InvalidArgument("input", "a sample that is NaN, infinite or beyond float32", "finite samples");
  }
  Run run;
  run.settings = settings_;
  run.settings.window = per_axis("--window", request_.window, noisy.rank, kWindow);
  run.settings.patch = per_axis("--patch", request_.patch, noisy.rank, kPatch);
  run.shape.assign(noisy.extent.end() - noisy.rank, noisy.extent.end());
  run.shape.push_back(noisy.channels);
  run.estimated = !request_.sigma && !request_.strength;
  if (run.estimated) {
    run.sigma = estimate_noise(noisy) / unit;
  } else {
    run.sigma = request_.sigma.value_or(0);
  }
  run.h = request_.strength.value_or(kStrength * run.sigma);
  run.settings.h = run.h * unit;
  runs_.push_back(run);
  if (run.h == 0) return noisy;
  Progress bar(context_.err, context_.progress);
  bar.update("denoise", 0);
  run.settings.progress = [&bar](double share) { bar.update("denoise", share); };
  return non_local_means(noisy, run.settings, &runs_.back().report);
}

}  // namespace vicus::cli
