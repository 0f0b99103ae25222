// `vicus profile`: how fast a problem is computed on this machine, next to what its arithmetic units allow.
#ifndef VICUS_CLI_PROFILE_H_
#define VICUS_CLI_PROFILE_H_

#include <CLI/App.hpp>

#include "cli/app.h"

namespace vicus::cli {

void add_profile(CLI::App& app, Context& context);

}  // namespace vicus::cli

#endif  // VICUS_CLI_PROFILE_H_
