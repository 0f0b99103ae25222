// Any lines as the arguments of the program: it returns 0, 1 or 2, and on an error says exactly one line.
//
// Files live in memory. Numbers stay small and timings are left out, so that every input is a matter of microseconds;
// what is left out is parsed all the same.
#include <algorithm>
#include <cctype>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "bytes.h"
#include "cli/app.h"
#include "require.h"

namespace {

using vicus::cli::testing::Bytes;
using vicus::cli::testing::MemoryFiles;

constexpr std::size_t kMaxArguments = 40;
constexpr unsigned kMaxNumber = 16;

std::vector<std::string> split_lines(const char* text, std::size_t size) {
  std::vector<std::string> lines(1, "vicus");
  std::string line;
  for (std::size_t i = 0; i < size; ++i) {
    if (text[i] == '\0') continue;  // cannot be in an argument
    if (text[i] != '\n') {
      line += text[i];
    } else {
      lines.push_back(std::move(line));
      line.clear();
    }
  }
  if (!line.empty()) lines.push_back(line);
  lines.resize(std::min(lines.size(), kMaxArguments));
  return lines;
}

/// Whether all numbers are small, however they are written: digits only, short, and none that multiplies (0x, e).
bool small_numbers(const std::string& argument) {
  for (std::size_t i = 0; i < argument.size();) {
    if (std::isdigit(static_cast<unsigned char>(argument[i])) == 0) {
      ++i;
      continue;
    }
    unsigned value = 0;
    std::size_t end = i;
    for (; end < argument.size() && std::isdigit(static_cast<unsigned char>(argument[end])) != 0; ++end) {
      value = value * 10 + static_cast<unsigned>(argument[end] - '0');
      if (value > kMaxNumber) return false;
    }
    if (end < argument.size() && std::isalpha(static_cast<unsigned char>(argument[end])) != 0) return false;
    i = end;
  }
  return true;
}

/// Subcommands that only compute; profile measures, compile and denoise use the disk.
bool may_run(const std::vector<std::string>& arguments) {
  for (const std::string& argument : arguments) {
    if (argument == "profile" || argument == "compile" || argument == "denoise") return false;
    if (argument.starts_with("--threads")) return false;
    if (!argument.ends_with(".npy") && !argument.ends_with(".safetensors") && !small_numbers(argument)) return false;
  }
  return true;
}

MemoryFiles make_files() {
  MemoryFiles files;
  const auto array = [](const std::string& shape, std::size_t count) {
    std::vector<float> values;
    values.reserve(count);
    for (std::size_t i = 0; i < count; ++i) values.push_back(0.25F * static_cast<float>(i % 7) - 0.75F);
    return vicus::cli::testing::npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + ")}",
                                    vicus::cli::testing::raw(values));
  };
  files.contents["a.npy"] = array("1, 5, 2, 3", 30);
  files.contents["b.npy"] = array("2, 3, 4, 2, 3", 144);
  files.contents["c.npy"] = array("2, 2, 2, 2, 1, 2", 32);
  files.contents["t.npy"] = array("1, 2, 2, 3", 12);
  files.contents["r.npy"] = array("2, 5", 10);
  files.contents["m.npy"] = array("1, 1, 5, 5", 25);
  const std::string header = R"({"query":{"dtype":"BF16","shape":[1,2,1,2],"data_offsets":[0,8]},)"
                             R"("key":{"dtype":"BF16","shape":[1,2,1,2],"data_offsets":[8,16]},)"
                             R"("value":{"dtype":"BF16","shape":[1,2,1,2],"data_offsets":[16,24]}})";
  files.contents["s.safetensors"] = vicus::cli::testing::safetensors(header, Bytes(24, std::byte{0x3e}));
  return files;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const MemoryFiles kFiles = make_files();
  const std::vector<std::string> arguments = split_lines(reinterpret_cast<const char*>(data), size);
  std::vector<const char*> argv;
  argv.reserve(arguments.size());
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  MemoryFiles files = kFiles;
  std::ostringstream out, err;
  vicus::cli::Context context{out, err, files, false, {}, !may_run(arguments)};
  const int code = vicus::cli::run(static_cast<int>(argv.size()), argv.data(), context);
  const std::string said = err.str();
  require(code >= 0 && code <= 2, "the exit code is 0, 1 or 2");
  if (code == 0) return 0;
  require(files.contents.size() == kFiles.contents.size(), "nothing is written on an error");
  require(said.starts_with("vicus: ") && said.ends_with('\n'), "an error is explained");
  const bool logs = std::any_of(arguments.begin(), arguments.end(),
                                [](const std::string& argument) { return argument.starts_with("--log-level"); });
  require(logs || std::count(said.begin(), said.end(), '\n') == 1, "in one line");
  return 0;
}
