// vicus compile: GPU kernels ahead of time.
#ifndef VICUS_CLI_COMPILE_H_
#define VICUS_CLI_COMPILE_H_

#include <CLI/App.hpp>

#include "cli/app.h"

namespace vicus::cli {

void add_compile(CLI::App& app, Context& context);

}  // namespace vicus::cli

#endif  // VICUS_CLI_COMPILE_H_
