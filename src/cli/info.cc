#include "cli/info.h"

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <cstdint>
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
      Version, instruction sets, threads, GPUs, the compiler for them and where it was found, libraries.
  vicus info --json
      The same for programs.)";

std::string join(const Json& list) {
  std::string text;
  for (const Json& word : list) text += (text.empty() ? "" : ", ") + word.get<std::string>();
  return text.empty() ? "none" : text;
}

Json describe(const GpuDevice& device) {
  return {{"name", device.name},
          {"compute_capability", std::to_string(device.major) + "." + std::to_string(device.minor)},
          {"multiprocessors", device.multiprocessors}};
}

Json collect() {
  const auto available = cpu_targets_available();
  const GpuRuntime gpu = gpu_runtime();
  Json devices = Json::array();
  for (const GpuDevice& device : gpu.devices) devices.push_back(describe(device));
  return {
      {"version", version()},
      {"engines", {"cpu", "sm80", "sm90", "reference"}},
      {"cpu",
       {{"targets_built", cpu_targets_built()},
        {"targets_available", available},
        {"target_used", available.empty() ? "none" : available.front()},
        {"threads", default_threads()}}},
      {"gpu",
       {{"driver", {{"problem", gpu.driver_problem}, {"library", gpu.driver_library}, {"version", gpu.driver_version}}},
        {"devices", devices},
        {"compiler",
         {{"problem", gpu.compiler_problem},
          {"library", gpu.compiler_library},
          {"version", gpu.compiler_version},
          {"found_in", gpu.compiler_found_in}}}}},
      {"libraries", {{"highway", VICUS_HWY_VERSION}, {"openmp", std::to_string(_OPENMP)}}},
      {"prebuilt", gpu.prebuilt_directory},
      {"cache",
       {{"directory", gpu.cache_directory},
        {"kernels", gpu.cache_entries},
        {"bytes", gpu.cache_bytes},
        {"limit_bytes", gpu.cache_limit_bytes}}}};
}

std::string text_of(const Json& word) { return word.get<std::string>(); }

/// The driver and its devices, one a line.
void print_gpu(const Json& gpu, std::ostream& out) {
  const Json &driver = gpu["driver"], &compiler = gpu["compiler"];
  out << "GPU driver ";
  if (text_of(driver["problem"]).empty()) {
    out << "CUDA " << text_of(driver["version"]) << ", " << text_of(driver["library"]) << '\n';
  } else {
    out << text_of(driver["problem"]) << '\n';
  }
  int ordinal = 0;
  for (const Json& device : gpu["devices"]) {
    out << "GPU " << ordinal++ << "      " << text_of(device["name"]) << ", compute capability "
        << text_of(device["compute_capability"]) << ", " << device["multiprocessors"] << " multiprocessors\n";
  }
  out << "compiler   ";
  if (text_of(compiler["problem"]).empty()) {
    out << "NVRTC " << text_of(compiler["version"]) << ", found in " << text_of(compiler["found_in"]) << ": "
        << text_of(compiler["library"]) << '\n';
  } else {
    out << text_of(compiler["problem"]) << '\n';
  }
}

void print_info(bool json, std::ostream& out) {
  const Json info = collect();
  if (json) {
    out << info.dump(2) << '\n';
    return;
  }
  constexpr std::uint64_t kMiB = 1 << 20;
  const Json &cpu = info["cpu"], &cache = info["cache"];
  out << "vicus      " << text_of(info["version"]) << "\nengines    " << join(info["engines"]) << "\nCPU        "
      << text_of(cpu["target_used"]) << " is used, of " << join(cpu["targets_available"])
      << " here (built: " << join(cpu["targets_built"]) << ")\nthreads    " << cpu["threads"] << '\n';
  print_gpu(info["gpu"], out);
  const std::string directory = text_of(cache["directory"]), prebuilt = text_of(info["prebuilt"]);
  if (!prebuilt.empty()) out << "prebuilt   " << prebuilt << '\n';
  out << "cache      " << (directory.empty() ? "none: VICUS_CACHE_DIR, XDG_CACHE_HOME and HOME are not set" : directory)
      << ": " << cache["kernels"] << " kernels, " << cache["bytes"].get<std::uint64_t>() / kMiB << " of at most "
      << cache["limit_bytes"].get<std::uint64_t>() / kMiB << " MiB\nlibraries  Highway "
      << text_of(info["libraries"]["highway"]) << ", OpenMP " << text_of(info["libraries"]["openmp"]) << '\n';
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
