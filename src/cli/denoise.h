// `vicus denoise`: non-local means for pictures, stacks of frames, sounds and columns of numbers.
#ifndef VICUS_CLI_DENOISE_H_
#define VICUS_CLI_DENOISE_H_

#include <CLI/App.hpp>

#include "cli/app.h"

namespace vicus::cli {

void add_denoise(CLI::App& app, Context& context);

}  // namespace vicus::cli

#endif  // VICUS_CLI_DENOISE_H_
