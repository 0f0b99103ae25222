// `vicus info`: what this build and this machine are.
#ifndef VICUS_CLI_INFO_H_
#define VICUS_CLI_INFO_H_

#include <CLI/App.hpp>

#include "cli/app.h"

namespace vicus::cli {

void add_info(CLI::App& app, Context& context);

}  // namespace vicus::cli

#endif  // VICUS_CLI_INFO_H_
