// The settings of `vicus denoise`, and the filter they make: what the kinds of file it reads and writes have in common.
#ifndef VICUS_CLI_DENOISE_FILTER_H_
#define VICUS_CLI_DENOISE_FILTER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/app.h"
#include "cli/denoise_nlm.h"
#include "cli/problem_options.h"

namespace vicus::cli {

/// The command line.
struct DenoiseRequest {
  std::vector<std::string> inputs;
  std::string output;
  std::vector<std::int64_t> window, patch;  ///< empty: by rank; one value: for every axis
  std::optional<double> sigma, strength;
  std::vector<std::string> columns;
  bool channels_last = false;
  std::string dtype = "auto";
  EngineOptions engine;
  std::int64_t memory_mib = 512;
  bool json = false;
};

/// Standard deviation of white noise in `noisy`: the median absolute response to Immerkaer's mask (second differences
/// along both picture axes, "Fast noise variance estimation", CVIU 64(2), 1996) divided by 0.6745 and the mask's norm,
/// the median in place of his mean as Donoho does with wavelets (Biometrika 81(3), 1994), so that edges do not count.
/// Root mean square over channels. 0 when no axis has three samples.
[[nodiscard]] double estimate_noise(const Samples& noisy);

/// Denoises what one command reads, and keeps what was done for the report.
class DenoiseFilter {
 public:
  /// One call of the filter: a picture, all frames, a sound, or one column.
  struct Run {
    double sigma = 0;  ///< in the user's units
    bool estimated = false;
    double h = 0;                     ///< in the user's units; 0: no noise was found, nothing was changed
    std::vector<std::int64_t> shape;  ///< axes in use and channels
    DenoiseReport report;
    NonLocalMeans settings;
  };

  /// Checks the settings that no file is needed for. Throws InvalidArgument.
  DenoiseFilter(const DenoiseRequest& request, Context& context);

  /// `unit`: how many steps of the samples are 1 in the units of --sigma.
  [[nodiscard]] Samples operator()(const Samples& noisy, double unit);

  [[nodiscard]] const std::vector<Run>& runs() const noexcept { return runs_; }
  double read_seconds = 0, write_seconds = 0;  ///< set by who reads and writes

 private:
  const DenoiseRequest& request_;
  Context& context_;
  NonLocalMeans settings_;
  std::vector<Run> runs_;
};

/// Reads, filters and writes; the kind of file is told by its content and name.
void denoise_files(const DenoiseRequest& request, Context& context, DenoiseFilter& filter);

}  // namespace vicus::cli

#endif  // VICUS_CLI_DENOISE_FILTER_H_
