#include "cli/plan.h"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <memory>
#include <ostream>
#include <string>

#include "cli/plan_json.h"
#include "cli/problem_options.h"
#include "vicus/compile.h"
#include "vicus/plan.h"

namespace vicus::cli {
namespace {

constexpr const char* kFooter = R"(Examples:
  vicus plan --layout 56 56 --heads 8 --head-dim 64 --kernel-size 13 13
      Engine, tiles and work ratio (work of the tiles / work of the mask) of a 13 x 13 window on 56 x 56 tokens.
  vicus plan --layout 4096 --heads 32 --heads-kv 8 --head-dim 128 --dense --causal top-left --json
      Every number of the plan of a causal layer with grouped heads, for programs.)";

struct PlanCommandOptions {
  ShapeOptions shape;
  MaskOptions mask;
  EngineOptions engine;
  std::string arch;
  bool json = false;
};

void print_plan(const PlanCommandOptions& options, std::ostream& out) {
  PlanOptions plan_options = make_plan_options(options.engine);
  if (!options.arch.empty()) plan_options.gpu = gpu_targets(options.arch, "--arch").front();
  const Plan plan = choose_plan(make_problem(options.shape, options.mask), plan_options);
  if (options.json) {
    out << to_json(plan).dump(2) << '\n';
    return;
  }
  const std::string text = describe(plan);
  out << text << (text.ends_with('\n') ? "" : "\n");
}

}  // namespace

void add_plan(CLI::App& app, Context& context) {
  auto options = std::make_shared<PlanCommandOptions>();
  CLI::App* command = app.add_subcommand("plan", "Show how a problem would be computed, and why, without computing it");
  command->footer(kFooter);
  add_shape_options(*command, options->shape);
  add_mask_options(*command, options->mask);
  add_engine_options(*command, options->engine);
  command
      ->add_option("--arch", options->arch,
                   "With --engine sm80 or sm90: sm_80, sm_90, ... [the first GPU of this machine]")
      ->type_name("NAME");
  command->add_flag("--json", options->json, "Print JSON");
  command->callback(
      [options, &context] { context.action = [options, &context] { print_plan(*options, context.out); }; });
}

}  // namespace vicus::cli
