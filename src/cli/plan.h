// `vicus plan`: how a problem would be computed, without computing it.
#ifndef VICUS_CLI_PLAN_H_
#define VICUS_CLI_PLAN_H_

#include <CLI/App.hpp>

#include "cli/app.h"

namespace vicus::cli {

void add_plan(CLI::App& app, Context& context);

}  // namespace vicus::cli

#endif  // VICUS_CLI_PLAN_H_
