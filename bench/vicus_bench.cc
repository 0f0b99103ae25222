// Times problems of a benchmark file through the C++ API and prints one JSON document: the machine's FMA peak, then one
// row per problem and pass. bench/cpu.py runs it next to its peers; by hand it answers for vicus alone.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "bench_problem.h"
#include "cli/peak.h"
#include "sampled_check.h"
#include "tensors.h"
#include "timing.h"
#include "vicus/vicus.hpp"

namespace vicus::bench {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string problems, only, exactly, engine = "auto", pass = "both";
  int threads = 0, samples = 8;
  bool peak_only = false, no_peak = false;
  TimingOptions timing;
};

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  const std::size_t half = x.size() / 2;
  return x.size() % 2 == 1 ? x[half] : 0.5 * (x[half - 1] + x[half]);
}

/// Peaks, measured once per type and thread count.
class Peaks {
 public:
  double of(DType type, int threads) {
    auto it = peaks_.find({threads, type});
    if (it == peaks_.end()) it = peaks_.emplace(std::pair(threads, type), measure(type, threads)).first;
    return it->second;
  }
  Json json() const {
    Json list = Json::array();
    for (const auto& [of, gflops] : peaks_) {
      const char* const type = of.second == DType::float64 ? "float64" : "float32";
      list.push_back({{"threads", of.first}, {"type", type}, {"gflops", gflops}});
    }
    return list;
  }

 private:
  static double measure(DType type, int threads) {
    return cli::measure_peak(type == DType::float64, threads).flops_per_second * 1e-9;
  }

  std::map<std::pair<int, DType>, double> peaks_;
};

Json tile_json(const QueryTile& tile) { return {{"rows", tile.rows}, {"heads", tile.heads}, {"extent", tile.extent}}; }

Json row_json(const BenchProblem& entry, const Plan& plan, bool backward) {
  Json row = {{"problem", entry.name},
              {"pass", backward ? "backward" : "forward"},
              {"dtype", dtype_name(plan.problem.dtype)},
              {"threads", plan.threads},
              {"engine", engine_name(plan.engine)},
              {"mask_pairs", plan.mask_pairs},
              {"flops", backward ? plan.backward_flops : plan.forward_flops},
              {"bytes", backward ? plan.backward_bytes : plan.forward_bytes}};
  if (plan.engine == Engine::cpu) {
    row["tile"] = tile_json(backward ? plan.backward.tile : plan.forward.tile);
    row["work_ratio"] = backward ? plan.backward.work.ratio() : plan.forward.work.ratio();
    row["scratch_bytes_per_thread"] = backward ? plan.backward.scratch_bytes : plan.forward.scratch_bytes;
  }
  return row;
}

void add_timing(Json& row, const Timing& timing) {
  const double flops = row["flops"].get<double>(), middle = median(timing.samples);
  row["seconds"] = {{"median", middle},
                    {"min", *std::min_element(timing.samples.begin(), timing.samples.end())},
                    {"max", *std::max_element(timing.samples.begin(), timing.samples.end())},
                    {"samples", timing.samples}};
  row["cpu_seconds"] = timing.cpu_seconds;
  row["gflops"] = flops / middle * 1e-9;
}

Json growth_json(std::optional<std::int64_t> before, std::optional<std::int64_t> peak, int threads) {
  if (!before || !peak) return {};
  return std::max<std::int64_t>(0, *peak - *before) / threads;
}

/// Rows of one problem. Throws when a result is wrong: a wrong kernel has no speed.
void run_problem(const BenchProblem& entry, const Options& options, Peaks& peaks, Json& rows) {
  PlanOptions plan_options;
  plan_options.engine = parse_engine(options.engine);
  plan_options.threads = options.threads;
  const Plan plan = choose_plan(entry.problem, plan_options);
  ProblemTensors tensors(plan.problem);
  const auto forward_call = [&] { forward(plan, tensors.inputs(), tensors.output.view(), tensors.logsumexp.view()); };
  const auto backward_call = [&] { backward(plan, tensors.inputs(), tensors.grad_inputs(), tensors.gradients()); };
  const bool backward_wanted = options.pass != "forward";

  // Against what is resident before any call: a later call may live in what an earlier one left.
  const auto before = resident_bytes();
  const auto forward_peak = peak_resident_bytes(forward_call);
  const auto backward_peak = backward_wanted ? peak_resident_bytes(backward_call) : std::nullopt;
  Json check;
  if (options.samples > 0) {
    const CheckErrors errors = sampled_check(plan.problem, tensors, options.samples, backward_wanted);
    if (const std::string complaint = errors.complaint(plan.problem.dtype); !complaint.empty()) {
      throw std::runtime_error(entry.name + ": " + complaint);
    }
    check = {{"output", errors.output}, {"logsumexp", errors.logsumexp}};
    if (backward_wanted) {
      check.update(
          Json{{"grad_query", errors.grad_query}, {"grad_key", errors.grad_key}, {"grad_value", errors.grad_value}});
    }
  }
  const DType type = plan.problem.dtype == DType::float64 ? DType::float64 : DType::float32;
  const double peak = options.no_peak ? 0 : peaks.of(type, plan.threads);
  for (const bool is_backward : {false, true}) {
    if (options.pass == (is_backward ? "forward" : "backward")) continue;
    Json row = row_json(entry, plan, is_backward);
    row["resident_growth_bytes_per_thread"] =
        growth_json(before, is_backward ? backward_peak : forward_peak, plan.threads);
    add_timing(row, is_backward ? time_calls(backward_call, options.timing) : time_calls(forward_call, options.timing));
    row["check"] = check;
    if (!options.no_peak) {
      row["peak_gflops"] = peak;
      row["peak_share"] = row["gflops"].get<double>() / peak;
    }
    rows.push_back(row);
  }
}

bool wanted(const BenchProblem& entry, const Options& options) {
  if (!options.exactly.empty()) return entry.name == options.exactly;
  return entry.name.find(options.only) != std::string::npos;
}

void run(const Options& options) {
  Peaks peaks;
  Json rows = Json::array();
  if (options.peak_only) {
    for (const int threads : {1, options.threads > 0 ? options.threads : default_threads()}) {
      for (const DType type : {DType::float32, DType::float64}) peaks.of(type, threads);
    }
  }
  if (!options.peak_only) {
    bool any = false;
    for (const BenchProblem& entry : read_problems(options.problems)) {
      if (!wanted(entry, options)) continue;
      any = true;
      run_problem(entry, options, peaks, rows);
    }
    if (!any) throw std::runtime_error("no problem of " + options.problems + " is called so");
  }
  Json document = {{"version", version()},
                   {"cpu_targets", cpu_targets_available()},
                   {"peak_target", cli::measure_peak(false, 1, 0).target}};
  if (!options.no_peak) document["peak"] = peaks.json();
  document["rows"] = rows;
  std::cout << document.dump(1) << '\n';
}

void add_options(CLI::App& app, Options& options) {
  app.add_option("--problems", options.problems, "Problem file (JSON)")->check(CLI::ExistingFile);
  app.add_option("--only", options.only, "Problems whose name contains this");
  app.add_option("--exactly", options.exactly, "The one problem of this name");
  app.add_option("--engine", options.engine, "auto, cpu or reference")->capture_default_str();
  app.add_option("--pass", options.pass, "forward, backward or both")
      ->check(CLI::IsMember(std::set<std::string>{"forward", "backward", "both"}))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "Threads; 0 means all that OpenMP would use")
      ->check(CLI::Range(0, 4096));
  app.add_option("--repeats", options.timing.repeats, "Fewest timed calls")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--least-seconds", options.timing.least_seconds, "Time each pass for at least this long");
  app.add_option("--most-seconds", options.timing.most_seconds, "Stop timing a pass after this long");
  app.add_option("--check-samples", options.samples, "Queries and keys compared with float64 loops; 0 for none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_flag("--peak-only", options.peak_only, "Only measure the FMA peak, of one thread and of all");
  app.add_flag("--no-peak", options.no_peak, "Do not measure the FMA peak before a problem");
}

}  // namespace
}  // namespace vicus::bench

int main(int argc, char** argv) {
  vicus::bench::Options options;
  CLI::App app{"Times vicus on the CPU and prints JSON"};
  vicus::bench::add_options(app, options);
  CLI11_PARSE(app, argc, argv);
  try {
    if (!options.peak_only && options.problems.empty()) throw std::runtime_error("--problems is missing");
    vicus::bench::run(options);
  } catch (const std::exception& error) {
    std::cerr << "vicus_bench: " << error.what() << '\n';
    return 2;
  }
  return 0;
}
