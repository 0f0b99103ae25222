#include "cli/compile.h"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <array>
#include <iomanip>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cli/problem_json.h"
#include "cli/problem_options.h"
#include "cli/progress.h"
#include "cli/validators.h"
#include "vicus/compile.h"
#include "vicus/error.h"
#include "vicus/info.h"

namespace vicus::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFooter =
    R"(A file of problems holds JSON objects as vicus plan --json prints them (the problem, or the whole plan), one after the other
or in a list. A process that has the directory in VICUS_PREBUILT_DIR finds its kernels there, on GPUs of these architectures.
Needs no GPU, only the compiler that vicus info shows.

Kernels depend on shapes, types, masks and on what a call asks for. By default those for forward calls with and without a
logsumexp, and for both ways of the backward pass, are compiled for tensors whose rows start at multiples of 16 bytes.

Examples:
  vicus compile -o kernels --layout 56 56 --heads 8 --kernel-size 7 --dtype bfloat16 --arch sm_80,sm_90
      All kernels of one layer for A100 and H100.
  vicus plan --layout 4096 --dense --dtype float16 --json >> problems.json
  vicus compile problems.json -o kernels --backward none
      Kernels of inference, for the GPUs of this machine or, where it has none, for all that are known.)";

struct CompileCommandOptions {
  std::vector<std::string> files, archs;
  std::string directory, forward = "both", backward = "both", rows = "aligned", bias_dtype;
  int jobs = 0;
  ShapeOptions shape;
  MaskOptions mask;
  bool json = false;
};

/// Problems of the files, or the one that the options describe, and where each came from.
std::vector<PlacedProblem> read_problems(const CompileCommandOptions& options, Files& files) {
  const bool described = !options.shape.layout.empty();
  if (options.files.empty() && !described) {
    throw InvalidArgument("PROBLEMS", "missing", "files, or --layout and a mask");
  }
  if (!options.files.empty() && described) throw InvalidArgument("--layout", "given with PROBLEMS", "one of the two");
  if (described) return {{make_problem(options.shape, options.mask), "the problem"}};
  std::vector<PlacedProblem> problems;
  for (const std::string& file : options.files) {
    const std::vector<std::byte> bytes = files.read("PROBLEMS", file);
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    for (PlacedProblem& problem : parse_problems(text, file)) problems.push_back(std::move(problem));
  }
  return problems;
}

/// The architectures asked for, or of the GPUs here, or all that the compiler knows.
std::vector<GpuTarget> targets_of(const std::vector<std::string>& archs) {
  std::vector<GpuTarget> targets;
  const auto add = [&](const std::string& arch) {
    for (const GpuTarget& target : gpu_targets(arch, "--arch")) targets.push_back(target);
  };
  for (const std::string& arch : archs) add(arch);
  if (targets.empty()) targets = gpu_targets_here();
  if (!targets.empty()) return targets;
  const GpuRuntime runtime = gpu_runtime();
  if (!runtime.compiler_problem.empty()) throw Unsupported(runtime.compiler_problem);
  for (const std::string& arch : gpu_architectures()) {
    const auto& known = runtime.compiler_architectures;
    if (std::find(known.begin(), known.end(), std::stoi(arch.substr(3))) != known.end()) add(arch);
  }
  return targets;
}

CompileOptions compile_options(const CompileCommandOptions& options) {
  CompileOptions result{.targets = targets_of(options.archs), .jobs = options.jobs};
  CallSet& calls = result.calls;
  calls.forward = options.forward != "none";
  calls.backward = options.backward != "none";
  if (options.forward != "both") calls.logsumexp = options.forward == "lse";
  if (options.backward != "both") result.deterministic = options.backward == "deterministic";
  if (options.rows == "both") {
    calls.aligned.reset();
  } else {
    calls.aligned = options.rows == "aligned";
  }
  if (!options.bias_dtype.empty()) calls.bias_dtype = parse_dtype(options.bias_dtype, "--bias-dtype");
  return result;
}

Json to_json(const CompiledKernel& kernel, const std::vector<PlacedProblem>& problems) {
  return {{"kernel", kernel.name},
          {"arch", kernel.arch},
          {"problem", problems[kernel.problem].place},
          {"threads", kernel.threads},
          {"registers", kernel.registers},
          {"shared_bytes", kernel.shared_bytes},
          {"stack_bytes", kernel.stack_bytes},
          {"spill_bytes", kernel.spill_bytes},
          {"seconds", kernel.seconds},
          {"from_cache", kernel.from_cache}};
}

void print(const CompileResult& result, const std::vector<PlacedProblem>& problems, const std::string& directory,
           std::ostream& out) {
  constexpr int kKernel = 30, kArch = 8;
  out << std::left << std::setw(kKernel) << "kernel" << std::setw(kArch) << "arch" << std::right
      << " threads  registers  shared bytes  spills  seconds  problem\n";
  for (const CompiledKernel& kernel : result.kernels) {
    out << std::left << std::setw(kKernel) << kernel.name << std::setw(kArch) << kernel.arch << std::right
        << std::setw(8) << kernel.threads << std::setw(11) << kernel.registers << std::setw(14) << kernel.shared_bytes
        << std::setw(8) << kernel.spill_bytes << std::setw(9);
    if (kernel.from_cache) {
      out << "there";
    } else {
      out << std::fixed << std::setprecision(2) << kernel.seconds;
    }
    out << "  " << problems[kernel.problem].place << '\n';
  }
  for (const SkippedCalls& skipped : result.skipped) {
    out << "left out: " << problems[skipped.problem].place << " on " << skipped.arch << ": " << skipped.reason << '\n';
  }
  out << result.kernels.size() << " kernels in " << directory << '\n';
}

void compile_ahead(const CompileCommandOptions& options, Context& context) {
  const std::vector<PlacedProblem> problems = read_problems(options, context.files);
  std::vector<Problem> list;
  for (const PlacedProblem& each : problems) {
    if (const std::string why_not = supports(each.problem, Engine::sm80); !why_not.empty()) {
      throw Unsupported(each.place + ": " + why_not);
    }
    list.push_back(each.problem);
  }
  const CompileOptions chosen = compile_options(options);
  CompileResult result;
  {
    Progress progress(context.err, context.progress);
    result = compile(list, options.directory, chosen, [&](std::size_t done, std::size_t total) {
      progress.update("kernel " + std::to_string(done) + " of " + std::to_string(total),
                      total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total));
    });
  }
  if (!options.json) return print(result, problems, options.directory, context.out);
  Json report = {{"directory", options.directory}, {"kernels", Json::array()}, {"skipped", Json::array()}};
  for (const CompiledKernel& kernel : result.kernels) report["kernels"].push_back(to_json(kernel, problems));
  for (const SkippedCalls& skipped : result.skipped) {
    report["skipped"].push_back(
        {{"problem", problems[skipped.problem].place}, {"arch", skipped.arch}, {"reason", skipped.reason}});
  }
  context.out << report.dump(2) << '\n';
}

}  // namespace

void add_compile(CLI::App& app, Context& context) {
  auto options = std::make_shared<CompileCommandOptions>();
  CLI::App* command = app.add_subcommand("compile", "Compile GPU kernels ahead of time into a directory to ship");
  command->footer(kFooter);
  command->add_option("PROBLEMS", options->files, "Files of problems, in place of the options for one")
      ->check(not_empty())
      ->type_name("FILE");
  command->add_option("-o,--output", options->directory, "Directory for the kernels; those that are there are kept")
      ->required()
      ->check(not_empty())
      ->type_name("DIR");
  command->add_option("--arch", options->archs, "Architectures: sm_80, sm_90, ... [those of the GPUs here, or all]")
      ->delimiter(',')
      ->allow_extra_args(false)  // what follows may be a file
      ->type_name("NAME,...");
  command->add_option("-j,--jobs", options->jobs, "Kernels compiled at a time [as many as there are processors]")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  const char* const calls = "Calls";
  const auto choice = [&](const std::string& name, std::string& value, const std::string& help,
                          const std::vector<std::string>& words) {
    command->add_option(name, value, help)->check(CLI::IsMember(words))->type_name("WORD")->group(calls);
  };
  choice("--forward", options->forward, "plain, lse (with a logsumexp), both or none [both]",
         {"plain", "lse", "both", "none"});
  choice("--backward", options->backward, "deterministic, parallel (sums in no fixed order), both or none [both]",
         {"deterministic", "parallel", "both", "none"});
  choice("--rows", options->rows, "Where rows of tensors start: aligned (to 16 bytes), unaligned or both [aligned]",
         {"aligned", "unaligned", "both"});
  command->add_option("--bias-dtype", options->bias_dtype, "Of the bias [that of the problem]")
      ->type_name("NAME")
      ->group(calls);
  add_shape_options(*command, options->shape);
  command->get_option("--layout")->required(false);
  add_mask_options(*command, options->mask);
  command->add_flag("--json", options->json, "Print JSON");
  command->callback(
      [options, &context] { context.action = [options, &context] { compile_ahead(*options, context); }; });
}

}  // namespace vicus::cli
