// A process for the Python tests to start, kill and look at: it does one thing with src/jit and prints "name value" lines.
//
//   probe compile ARCH [--file F] [--specific] [--out CUBIN]   compiles standard input; ARCH is 80, 90, 100
//   probe prebuild ARCH DIRECTORY                              compiles standard input ahead of time
//   probe nvrtc [--preload LIBRARY] [--directory D]...         finds the compiler
//   probe driver                                               starts the driver
//   probe lookup                                               times KernelCache::get for a key that is known
//   probe fork-first                                           starts the driver only in a child of fork()
// When something is thrown, the exit code is 1 and the last that is printed is "\nerror TEXT", of many lines maybe.
// Warnings of the library are "warning TEXT".
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/log.h"
#include "jit/compile.h"
#include "jit/module.h"
#include "jit/nvrtc.h"

namespace vicus::jit {
namespace {

using Words = std::vector<std::string>;

/// The word after `option`, or an empty one.
std::string value_of(const Words& words, const std::string& option) {
  const auto at = std::find(words.begin(), words.end(), option);
  return at == words.end() || at + 1 == words.end() ? "" : at[1];
}

void compile(const Words& words) {
  const int arch = std::stoi(words.at(1));
  Source source{.file = value_of(words, "--file"), .prologue = {std::istreambuf_iterator<char>(std::cin), {}}};
  source.arch_specific = std::find(words.begin(), words.end(), "--specific") != words.end();
  CompileReport report;
  const auto start = std::chrono::steady_clock::now();
  const std::string code = cubin(source, {arch / 10, arch % 10}, &report);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  if (const std::string out = value_of(words, "--out"); !out.empty()) std::ofstream(out, std::ios::binary) << code;
  std::cout << "kernel " << report.kernel << "\nregisters " << report.registers << "\nstack " << report.stack_bytes
            << "\nspill_stores " << report.spill_store_bytes << "\nspill_loads " << report.spill_load_bytes
            << "\nshared " << report.shared_bytes << "\nseconds " << report.seconds << "\nfrom_cache "
            << report.from_cache << "\nbytes " << code.size() << "\ntotal_seconds " << took.count() << '\n';
}

void compile_ahead(const Words& words) {
  const int arch = std::stoi(words.at(1));
  prebuild({.prologue = {std::istreambuf_iterator<char>(std::cin), {}}}, {arch / 10, arch % 10}, words.at(2));
}

void find_nvrtc(const Words& words) {
  if (const std::string library = value_of(words, "--preload"); !library.empty()) {
    if (::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) throw std::runtime_error(::dlerror());
  }
  for (std::size_t i = 1; i + 1 < words.size(); ++i) {
    if (words[i] == "--directory") set_nvrtc_directory(words[i + 1]);
  }
  std::cout << "path " << nvrtc().path() << "\nfound_in " << nvrtc().found_in() << "\nversion " << nvrtc().version()
            << '\n';
}

void start_driver() {
  std::cout << "path " << driver().path << "\nversion " << driver().version << "\ndevices " << device_count() << '\n';
}

/// As large as the description of an attention kernel.
struct Key {
  int fields[32] = {};
  friend bool operator<(const Key& a, const Key& b) {
    return std::lexicographical_compare(std::begin(a.fields), std::end(a.fields), std::begin(b.fields),
                                        std::end(b.fields));
  }
};

void time_lookup() {
  constexpr int kKeys = 64, kRounds = 20000;
  const ContextGuard guard(0);
  KernelCache<Key> cache;
  const auto make = [](const Key& key) {
    return Source{.prologue = "// " + std::to_string(key.fields[31]) + "\n__global__ void k(Args a) {}"};
  };
  std::vector<Key> keys(kKeys);
  for (int i = 0; i < kKeys; ++i) {
    keys[static_cast<std::size_t>(i)].fields[31] = i;  // equal to the end: the longest comparison
    cache.get(keys[static_cast<std::size_t>(i)], nullptr, make);
  }
  int registers = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int round = 0; round < kRounds; ++round) {
    for (const Key& key : keys) registers += cache.get(key, nullptr, make).registers;
  }
  const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
  std::cout << "nanoseconds " << took.count() / (kKeys * kRounds) << "\nregisters " << registers << '\n';
}

void fork_first() {
  const pid_t child = ::fork();
  if (child == 0) {
    try {
      start_driver();
      std::cout.flush();
      ::_exit(0);
    } catch (const std::exception& error) {
      std::cout << "\nerror " << error.what() << std::endl;
      ::_exit(1);
    }
  }
  int status = 1;
  if (::waitpid(child, &status, 0) != child || status != 0) throw std::runtime_error("the child failed");
}

int run(const Words& words) {
  set_log_sink([](LogLevel, std::string_view text) { std::cout << "warning " << text << std::endl; },
               LogLevel::warning);
  try {
    const std::string& what = words.at(0);
    if (what == "compile") compile(words);
    if (what == "prebuild") compile_ahead(words);
    if (what == "nvrtc") find_nvrtc(words);
    if (what == "driver") start_driver();
    if (what == "lookup") time_lookup();
    if (what == "fork-first") fork_first();
    return 0;
  } catch (const std::exception& error) {
    std::cout << "\nerror " << error.what() << std::endl;
    return 1;
  }
}

}  // namespace
}  // namespace vicus::jit

int main(int argc, char** argv) { return vicus::jit::run({argv + 1, argv + argc}); }
