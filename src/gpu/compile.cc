#include "vicus/compile.h"

#include <filesystem>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "gpu/kernels.h"
#include "jit/at_once.h"
#include "jit/compile.h"
#include "vicus/error.h"

namespace vicus {
namespace {

struct Wanted {
  jit::Arch arch;
  gpu::Spec spec;
  std::size_t problem = 0;
};

/// What there is to compile, each kernel once.
class WorkList {
 public:
  WorkList(std::span<const Problem> problems, const CompileOptions& options) : options_(options) {
    for (std::size_t i = 0; i < problems.size(); ++i) {
      const Problem problem = checked(problems[i], i);
      for (const GpuTarget& target : options.targets) add(problem, i, target);
    }
  }

  std::vector<Wanted> wanted;
  std::vector<SkippedCalls> skipped;

 private:
  /// The problem with its defaults, if some GPU takes it.
  static Problem checked(const Problem& problem, std::size_t index) {
    const std::string name = "problems[" + std::to_string(index) + "]";
    try {
      Problem valid = validate(problem);
      if (const std::string why_not = supports(valid, Engine::sm80); !why_not.empty()) {
        throw Unsupported(name + ": " + why_not);
      }
      return valid;
    } catch (const InvalidArgument& error) {
      throw error.within(name);
    }
  }

  void add(const Problem& problem, std::size_t index, const GpuTarget& target) {
    const auto add_calls = [&](const CallSet& calls, bool deterministic) {
      PlanOptions plan{.gpu = target};
      plan.backward.deterministic = deterministic;
      plan.backward.memory = MemoryPreference::unrestricted;  // splits wherever any preference would
      const jit::Arch arch{target.major, target.minor};
      try {
        for (const gpu::Spec& spec : gpu::kernels_of(choose_plan(problem, plan), calls)) {
          if (known_.emplace(std::pair(target.major, target.minor), spec).second) wanted.push_back({arch, spec, index});
        }
      } catch (const Unsupported& error) {
        skipped.push_back({index, name_of(arch), error.what()});
      }
    };
    CallSet calls = options_.calls;
    calls.backward = false;
    if (options_.calls.forward) add_calls(calls, false);
    if (!options_.calls.backward) return;
    calls.forward = false;
    calls.backward = true;
    for (const bool deterministic : {false, true}) {
      if (options_.deterministic.value_or(deterministic) == deterministic) add_calls(calls, deterministic);
    }
  }

  const CompileOptions& options_;
  std::set<std::pair<std::pair<int, int>, gpu::Spec>> known_;
};

}  // namespace

CompileResult compile(std::span<const Problem> problems, const std::string& directory, const CompileOptions& options,
                      const std::function<void(std::size_t done, std::size_t total)>& progress) {
  if (directory.empty()) throw InvalidArgument("directory", "''", "a path");
  if (options.jobs < 0) throw InvalidArgument("jobs", std::to_string(options.jobs), ">= 0");
  if (options.targets.empty()) throw InvalidArgument("targets", "empty", "one GPU at least");
  WorkList work(problems, options);
  for (const GpuTarget& target : options.targets) jit::require_compiler({target.major, target.minor});
  std::error_code failed;
  std::filesystem::create_directories(directory, failed);
  if (failed) throw std::runtime_error("directory '" + directory + "' cannot be made: " + failed.message());
  CompileResult result{.kernels = {}, .skipped = std::move(work.skipped)};
  if (progress) progress(0, work.wanted.size());
  result.kernels.resize(work.wanted.size());
  std::mutex mutex;  // of the progress
  std::size_t done = 0;
  const auto compile_one = [&](std::size_t i) {
    const Wanted& each = work.wanted[i];
    const jit::Source source = source_of(each.spec);
    const jit::CompileReport report = jit::prebuild(source, each.arch, directory);
    result.kernels[i] = {.name = name_of(source),
                         .arch = name_of(each.arch),
                         .problem = each.problem,
                         .threads = each.spec.threads(),
                         .registers = report.registers,
                         .shared_bytes = shared_bytes(each.spec) + report.shared_bytes,
                         .stack_bytes = report.stack_bytes,
                         .spill_bytes = report.spill_store_bytes + report.spill_load_bytes,
                         .seconds = report.seconds,
                         .from_cache = report.from_cache};
    const std::lock_guard lock(mutex);
    if (progress) progress(++done, work.wanted.size());
  };
  jit::at_once(work.wanted.size(), compile_one, static_cast<std::size_t>(options.jobs));
  return result;
}

}  // namespace vicus
