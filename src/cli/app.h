// The program `vicus` as a function: arguments in, text and files out, exit code back.
//
// Tests and fuzzers call `run` in process; main.cc only hands over the real streams and the disk. A subcommand lives in
// its own file and exposes `add_<name>`: it adds its options to the CLI11 app and a callback that stores the work in
// `Context::action`. The work runs after the whole command line was parsed, so nothing is read, computed or written when
// any argument is wrong.
//
// Exit codes: 0 done; 1 the machine said no (IoError: a file that cannot be opened or written, memory); 2 wrong input
// (vicus::InvalidArgument, vicus::Unsupported, any usage error, a file that does not hold what it should). Every error is
// one line on `err` that names the argument.
#ifndef VICUS_CLI_APP_H_
#define VICUS_CLI_APP_H_

#include <functional>
#include <iosfwd>

#include "cli/files.h"

namespace vicus::cli {

/// What a subcommand may touch. Results go to `out`, everything else to `err`.
struct Context {
  std::ostream& out;
  std::ostream& err;
  Files& files;                  ///< where arrays are read from and written to
  bool progress = false;         ///< `err` is a terminal: a progress bar may be drawn
  std::function<void()> action;  ///< the work of the chosen subcommand, set by its callback
  bool parse_only = false;       ///< leave `action` to the caller
};

/// Parses the command line, runs the chosen subcommand, reports errors. Never throws.
int run(int argc, const char* const* argv, Context& context);

/// The same on the disk. `progress` is on when standard error is a terminal.
int run(int argc, const char* const* argv, std::ostream& out, std::ostream& err);

}  // namespace vicus::cli

#endif  // VICUS_CLI_APP_H_
