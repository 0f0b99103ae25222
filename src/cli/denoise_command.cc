#include "cli/denoise.h"

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <ostream>

#include "cli/denoise_filter.h"
#include "cli/plan_json.h"

namespace vicus::cli {
namespace {

constexpr const char* kFooter =
    R"(Every sample becomes the mean of the samples in its window, weighted by how alike the patches around them are
(non-local means, the same as scikit-image's denoise_nl_means with fast_mode=False, without its cut-off). Kinds of file:
  PNG            grey or colour, 8 or 16 bits; alpha stays as it is. Several PNGs are the frames of a film: window and
                 patch have an axis of time first, and --output is a directory.
  WAV, FLAC ...  all channels together; full scale is 1.
  CSV, TSV       columns of numbers, each for itself; every other field stays as it is.
  NPY            float32 or float64: [length], [height, width] or [frames, height, width]; also FILE.safetensors:NAME.

Examples:
  vicus denoise photo.png -o clean.png
      Estimates the noise and removes it.
  vicus denoise photo.png -o clean.png --window 21 --patch 7 --sigma 20
      The same for noise of standard deviation 20 on the scale 0..255.
  vicus denoise frame*.png -o clean/ --window 5,21,21
      Looks for similar patches two frames back and ahead, too.
  vicus denoise log.csv -o clean.csv --columns temperature,humidity --window 301 --patch 25)";

std::string joined(const std::vector<std::int64_t>& values) {
  std::string text;
  for (const std::int64_t value : values) text += (text.empty() ? "" : "x") + std::to_string(value);
  return text;
}

std::vector<std::int64_t> axes_in_use(const Extent& extent, const DenoiseFilter::Run& run) {
  return {extent.end() - static_cast<std::ptrdiff_t>(run.shape.size() - 1), extent.end()};
}

Json to_json(const DenoiseFilter::Run& run) {
  const DenoiseReport& r = run.report;
  Json json = {{"shape", run.shape}, {"sigma", run.sigma}, {"sigma_estimated", run.estimated}, {"strength", run.h}};
  json["window"] = axes_in_use(run.settings.window, run);
  json["patch"] = axes_in_use(run.settings.patch, run);
  if (r.blocks == 0) return json;  // no noise, nothing computed
  json["engine"] = engine_name(r.engine);
  json["reason"] = r.engine_reason;
  json["threads"] = r.threads;
  json["dtype"] = dtype_name(r.dtype);
  json["head_dim"] = r.head_dim;
  json["head_dim_v"] = run.shape.back();
  json["blocks"] = r.blocks;
  json["block"] = axes_in_use(r.block, run);
  json["pairs"] = r.pairs;
  json["tile_pairs"] = r.tile_pairs;
  json["work_ratio"] = r.tile_pairs / r.pairs;
  json["gflop"] = r.flops * 1e-9;
  json["gflop_per_second"] = r.flops * 1e-9 / r.attention_seconds;
  json["feature_seconds"] = r.feature_seconds;
  json["attention_seconds"] = r.attention_seconds;
  return json;
}

void print_text(const DenoiseFilter::Run& run, std::ostream& out) {
  const DenoiseReport& r = run.report;
  char line[256];
  if (r.blocks == 0) {
    out << joined(run.shape) << ": no noise found, written as it was\n";
    return;
  }
  std::snprintf(line, sizeof(line),
                ": strength %.4g (%s), window %s, patch %s; %.3g s at %.3g GFLOP/s on %d thread%s\n", run.h,
                run.estimated ? "noise estimated" : "as given", joined(axes_in_use(run.settings.window, run)).c_str(),
                joined(axes_in_use(run.settings.patch, run)).c_str(), r.feature_seconds + r.attention_seconds,
                r.flops * 1e-9 / r.attention_seconds, r.threads, r.threads == 1 ? "" : "s");
  out << joined(run.shape) << line;
}

void denoise(const DenoiseRequest& request, Context& context) {
  const auto start = std::chrono::steady_clock::now();
  DenoiseFilter filter(request, context);
  denoise_files(request, context, filter);
  if (!request.json) {
    for (const DenoiseFilter::Run& run : filter.runs()) print_text(run, context.out);
    return;
  }
  Json json = {{"input", request.inputs}, {"output", request.output}, {"runs", Json::array()}};
  for (const DenoiseFilter::Run& run : filter.runs()) json["runs"].push_back(to_json(run));
  json["read_seconds"] = filter.read_seconds;
  json["write_seconds"] = filter.write_seconds;
  json["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  context.out << json.dump(2) << '\n';
}

}  // namespace

void add_denoise(CLI::App& app, Context& context) {
  auto request = std::make_shared<DenoiseRequest>();
  CLI::App* command =
      app.add_subcommand("denoise", "Remove noise from pictures, frames, sounds and columns of numbers");
  command->footer(kFooter);
  command->add_option("input", request->inputs, "What to denoise")->required()->type_name("FILE ...");
  command->add_option("-o,--output", request->output, "Result, of the same kind; replaced whole or not at all")
      ->required()
      ->type_name("FILE");
  const auto axes = [&](const std::string& name, std::vector<std::int64_t>& values, const std::string& help) {
    command->add_option(name, values, help)
        ->expected(1, 3)
        ->delimiter(',')
        ->allow_extra_args(false)
        ->type_name("N[,N,N]")
        ->group("Filter");
  };
  axes("--window", request->window, "Where similar patches are searched, odd [255; 21; 5,21,21 for frames]");
  axes("--patch", request->patch, "What is compared, odd [15; 7; 1,7,7 for frames]");
  command
      ->add_option(
          "--sigma", request->sigma,
          "Standard deviation of the noise: PNG on the scale 0..255 also with 16 bits, everything else in units of "
          "its own [estimated]")
      ->type_name("X")
      ->group("Filter");
  command->add_option("--strength,--h", request->strength, "Strength h of the filter, in units of sigma's [sigma]")
      ->type_name("X")
      ->group("Filter");
  command->add_option("--columns", request->columns, "Columns of a table, by name or number from 1 [the last]")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("NAME[,NAME]")
      ->group("Files");
  command
      ->add_flag("--channels-last", request->channels_last,
                 "The last axis of an array holds channels, compared together")
      ->group("Files");
  command
      ->add_option("--dtype", request->dtype,
                   "float32, float64, or auto: float32 unless its rounding could move a weight by 1e-3 [auto]")
      ->type_name("NAME")
      ->group("Computation");
  command->add_option("--memory", request->memory_mib, "MiB for the tensors of one block [512]")
      ->type_name("MIB")
      ->group("Computation");
  add_engine_options(*command, request->engine);
  command->add_flag("--json", request->json, "Print times, plan and noise as JSON")->group("Computation");
  command->callback([request, &context] { context.action = [request, &context] { denoise(*request, context); }; });
}

}  // namespace vicus::cli
