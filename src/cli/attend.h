// `vicus attend`: attention of arrays in files, into files.
#ifndef VICUS_CLI_ATTEND_H_
#define VICUS_CLI_ATTEND_H_

#include <CLI/App.hpp>

#include "cli/app.h"

namespace vicus::cli {

void add_attend(CLI::App& app, Context& context);

}  // namespace vicus::cli

#endif  // VICUS_CLI_ATTEND_H_
