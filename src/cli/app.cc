#include "cli/app.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/ostream_sink.h>
#include <unistd.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <array>
#include <exception>
#include <memory>
#include <new>
#include <ostream>
#include <stdexcept>
#include <string>
#include <utility>

#include "cli/attend.h"
#include "cli/compile.h"
#include "cli/denoise.h"
#include "cli/format.h"
#include "cli/info.h"
#include "cli/plan.h"
#include "cli/profile.h"
#include "vicus/error.h"
#include "vicus/info.h"
#include "vicus/log.h"

namespace vicus::cli {
namespace {

constexpr int kDone = 0, kMachineSaidNo = 1, kWrongInput = 2;

constexpr const char* kFooter = R"(Examples:
  vicus attend -q q.npy -k k.npy -v v.npy --kernel-size 7 7 -o out.npy
  vicus profile --layout 56 56 --heads 8 --head-dim 64 --kernel-size 13 13
Every subcommand explains itself: vicus attend --help

Environment:
  VICUS_CACHE_DIR      compiled GPU kernels [vicus below XDG_CACHE_HOME or ~/.cache]
  VICUS_CACHE_BYTES    their most bytes, 0 to keep none [1 GiB]
  VICUS_PREBUILT_DIR   kernels that vicus compile made, looked at first
  VICUS_NVRTC          the compiler, libnvrtc or its directory [found: see vicus info]
  VICUS_CUDA_DRIVER    the driver [libcuda.so.1]
  VICUS_CPU_TARGET     instruction set to use, of those that vicus info shows)";

/// One line of printable text: names of files and tensors come from anywhere.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = c == '\n' ? ' ' : '?';
  }
  return text;
}

/// Connects the library's logger to `err` for as long as it lives.
class Logging {
 public:
  Logging(std::ostream& err, const std::string& level) {
    if (level == "off") return;
    auto logger =
        std::make_shared<spdlog::logger>("vicus", std::make_shared<spdlog::sinks::ostream_sink_mt>(err, true));
    logger->set_pattern("vicus: %l: %v");
    logger->set_level(spdlog::level::debug);
    const LogLevel least = level == "debug" ? LogLevel::debug : level == "info" ? LogLevel::info : LogLevel::warning;
    set_log_sink(
        [logger](LogLevel at, std::string_view message) {
          logger->log(at == LogLevel::debug  ? spdlog::level::debug
                      : at == LogLevel::info ? spdlog::level::info
                                             : spdlog::level::warn,
                      "{}", message);
        },
        least);
  }
  ~Logging() { set_log_sink({}); }
  Logging(Logging&&) = delete;
  Logging(const Logging&) = delete;
  Logging& operator=(Logging&&) = delete;
  Logging& operator=(const Logging&) = delete;
};

/// The library speaks of `kernel_size[1]`; a person at a shell wrote --kernel-size. Where the chosen subcommand has that
/// option, its name is put in place.
std::string as_option(const std::string& argument, const CLI::App& app) {
  const std::size_t end = std::min(argument.find_first_of("[."), argument.size());
  std::string option = "--" + (argument.starts_with("is_causal") ? "causal" : argument.substr(0, end));
  std::replace(option.begin(), option.end(), '_', '-');
  for (const CLI::App* command : app.get_subcommands()) {
    if (command->get_option_no_throw(option) != nullptr) return option + argument.substr(end);
  }
  return argument;
}

std::string message_of(const InvalidArgument& error, const CLI::App& app) {
  std::string what = error.what();
  if (!what.starts_with(error.argument())) return what;
  return as_option(error.argument(), app) + what.substr(error.argument().size());
}

int run_unguarded(int argc, const char* const* argv, Context& context, CLI::App& app) {
  app.footer(kFooter);
  app.require_subcommand(0, 1);  // none is reported below: only then are unknown words reported by name
  app.set_version_flag("--version", "vicus " + std::string(version()));
  std::string log_level = "warning";
  app.add_option("--log-level", log_level, "Messages on standard error: debug, info, warning or off [warning]")
      ->check(CLI::IsMember({"debug", "info", "warning", "off"}))
      ->type_name("LEVEL");
  app.fallthrough();  // --log-level is understood after the subcommand, too
  add_attend(app, context);
  add_compile(app, context);
  add_denoise(app, context);
  add_plan(app, context);
  add_profile(app, context);
  add_info(app, context);
  try {
    std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
    std::reverse(arguments.begin(), arguments.end());  // CLI11 takes them from the back
    app.parse(std::move(arguments));
  } catch (const CLI::CallForHelp&) {
    context.out << app.help();
    return kDone;
  } catch (const CLI::CallForVersion& version_text) {
    context.out << version_text.what() << '\n';
    return kDone;
  }
  if (app.get_subcommands().empty()) {
    throw InvalidArgument("command", "missing", "attend, compile, denoise, plan, profile or info; see vicus --help");
  }
  const Logging logging(context.err, log_level);
  if (context.action && !context.parse_only) context.action();
  return kDone;
}

}  // namespace

int run(int argc, const char* const* argv, Context& context) {
  CLI::App app("Dense and neighborhood attention", "vicus");
  int code = kDone;
  std::string message;
  try {
    code = run_unguarded(argc, argv, context, app);
    if (!context.out.flush()) throw IoError("standard output: cannot write");
  } catch (const InvalidArgument& error) {
    code = kWrongInput;
    message = message_of(error, app);
  } catch (const Unsupported& error) {
    code = kWrongInput;
    message = error.what();
  } catch (const FormatError& error) {
    code = kWrongInput;
    message = error.what();
  } catch (const CLI::ParseError& error) {
    code = kWrongInput;
    const auto commands = app.get_subcommands();
    message = std::string(error.what()) + "; see vicus " +
              (commands.empty() ? "" : commands.front()->get_name() + " ") + "--help";
  } catch (const std::bad_alloc&) {
    code = kMachineSaidNo;
    message = "out of memory";
  } catch (const std::length_error&) {  // a container larger than any memory
    code = kMachineSaidNo;
    message = "out of memory";
  } catch (const std::exception& error) {
    code = kMachineSaidNo;
    message = error.what();
  }
  if (code != kDone) context.err << "vicus: " << one_line(message) << std::endl;
  return code;
}

int run(int argc, const char* const* argv, std::ostream& out, std::ostream& err) {
  DiskFiles files;
  Context context{out, err, files, ::isatty(STDERR_FILENO) == 1, {}, false};
  return run(argc, argv, context);
}

}  // namespace vicus::cli
