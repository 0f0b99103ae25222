#include "cli/info.h"

#include <dlfcn.h>

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

#include "vicus/info.h"

namespace vicus::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFooter = R"(Examples:
  vicus info
      Version, instruction sets, threads, GPU driver, libraries.
  vicus info --json
      The same for programs.)";

std::string join(const Json& list) {
  std::string text;
  for (const Json& word : list) text += (text.empty() ? "" : ", ") + word.get<std::string>();
  return text.empty() ? "none" : text;
}

/// Whether the driver's library can be opened; no device is asked for, as no engine would use it.
bool cuda_driver_opens() {
  void* const library = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library != nullptr) ::dlclose(library);
  return library != nullptr;
}

Json collect() {
  const auto available = cpu_targets_available();
  return {{"version", version()},
          {"engines", {"cpu", "reference"}},
          {"cpu",
           {{"targets_built", cpu_targets_built()},
            {"targets_available", available},
            {"target_used", available.empty() ? "none" : available.front()},
            {"threads", default_threads()}}},
          {"gpu",
           {{"engine", false},
            {"note", "this build has no GPU engine"},
            {"driver_library", "libcuda.so.1"},
            {"driver_library_opens", cuda_driver_opens()}}},
          {"libraries", {{"highway", VICUS_HWY_VERSION}, {"openmp", std::to_string(_OPENMP)}}},
          {"cache", "none: this build compiles nothing at run time"}};
}

void print_info(bool json, std::ostream& out) {
  const Json info = collect();
  if (json) {
    out << info.dump(2) << '\n';
    return;
  }
  const Json& cpu = info["cpu"];
  const Json& gpu = info["gpu"];
  out << "vicus      " << info["version"].get<std::string>() << "\nengines    " << join(info["engines"])
      << "\nCPU        " << cpu["target_used"].get<std::string>() << " is used, of " << join(cpu["targets_available"])
      << " here (built: " << join(cpu["targets_built"]) << ")\nthreads    " << cpu["threads"] << "\nGPU        "
      << gpu["note"].get<std::string>() << "; the driver library " << gpu["driver_library"].get<std::string>()
      << (gpu["driver_library_opens"].get<bool>() ? " opens" : " does not open") << "\nlibraries  Highway "
      << info["libraries"]["highway"].get<std::string>() << ", OpenMP "
      << info["libraries"]["openmp"].get<std::string>() << "\ncache      " << info["cache"].get<std::string>() << '\n';
}

}  // namespace

void add_info(CLI::App& app, Context& context) {
  auto json = std::make_shared<bool>(false);
  CLI::App* command = app.add_subcommand("info", "Show what this build and this machine are");
  command->footer(kFooter);
  command->add_flag("--json", *json, "Print JSON");
  command->callback([json, &context] { context.action = [json, &context] { print_info(*json, context.out); }; });
}

}  // namespace vicus::cli
