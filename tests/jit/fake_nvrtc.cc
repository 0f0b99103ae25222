// A libnvrtc that compiles nothing: the "cubin" is made from the text and the options, and the log is written as ptxas
// writes its own. Environment:
//   FAKE_NVRTC_COMPILER a command that compiles after all: called with a folder, where it finds main.cu and headers and
//                       leaves cubin and log, and with the options
//   FAKE_NVRTC_LOG    a file that gets one line per compilation, from all processes
//   FAKE_NVRTC_SLEEP  milliseconds that a compilation takes
//   FAKE_NVRTC_VERSION "13.1"
//   FAKE_NVRTC_FAIL   set: nothing compiles
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <string>
#include <thread>

namespace {

struct Program {
  std::string text, log, cubin;
  std::map<std::string, std::string> files;
};

std::string content(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// Whether `compiler` made a cubin. The log is what it said.
bool compile_by(const char* compiler, Program& program, const std::string& options) {
  std::string folder = (std::filesystem::temp_directory_path() / "vicus-nvrtc-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) return false;
  for (const auto& [name, text] : program.files) {
    const std::filesystem::path file = std::filesystem::path(folder) / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  const std::string command = std::string(compiler) + " '" + folder + "'" + options;
  const bool done = std::system(command.c_str()) == 0;
  program.cubin = content(std::filesystem::path(folder) / "cubin");
  program.log += content(std::filesystem::path(folder) / "log");
  std::filesystem::remove_all(folder);
  return done && !program.cubin.empty();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int nvrtcVersion(int* major, int* minor) {
  const char* const text = std::getenv("FAKE_NVRTC_VERSION");
  return std::sscanf(text == nullptr ? "13.1" : text, "%d.%d", major, minor) == 2 ? 0 : 1;
}
EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  *count = 3;
  return 0;
}
EXPORT int nvrtcGetSupportedArchs(int* archs) {
  archs[0] = 80;
  archs[1] = 86;
  archs[2] = 90;
  return 0;
}
EXPORT const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR_COMPILATION"; }
EXPORT int nvrtcCreateProgram(Program** program, const char* text, const char* name, int headers,
                              const char* const* texts, const char* const* names) {
  *program = new Program{text, {}, {}, {{"main.cu", text}}};
  for (int i = 0; i < headers; ++i) {
    (*program)->text += std::string("\n// ") + names[i] + "\n" + texts[i];
    (*program)->files[names[i]] = texts[i];
  }
  return name != nullptr ? 0 : 1;
}
EXPORT int nvrtcDestroyProgram(Program** program) {
  delete *program;
  *program = nullptr;
  return 0;
}
EXPORT int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  if (const char* const file = std::getenv("FAKE_NVRTC_LOG"); file != nullptr) {
    const int log = ::open(file, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (::write(log, "compiled\n", 9) != 9) return 7;
    ::close(log);
  }
  if (const char* const pause = std::getenv("FAKE_NVRTC_SLEEP"); pause != nullptr) {
    std::this_thread::sleep_for(std::chrono::milliseconds(std::atoi(pause)));
  }
  if (program->text.find("#error") != std::string::npos || std::getenv("FAKE_NVRTC_FAIL") != nullptr) {
    program->log = "kernel.cu(1): error: #error directive";
    return 6;
  }
  // From 12.9 on there is a cache, which --no-cache switches off; what comes from it has no report.
  int major = 0, minor = 0;
  nvrtcVersion(&major, &minor);
  const bool caches = major * 100 + minor >= 1209;
  bool switched_off = false;
  for (int i = 0; i < count; ++i) switched_off = switched_off || std::string(options[i]) == "--no-cache";
  if (switched_off && !caches) {
    program->log = "nvrtc: error: unrecognized option --no-cache";
    return 5;
  }
  const bool reports = switched_off || !caches;
  static const std::regex kernel(R"(__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+))");
  for (std::sregex_iterator it(program->text.begin(), program->text.end(), kernel), end; reports && it != end; ++it) {
    program->log += "ptxas info    : Compiling entry function '" + (*it)[1].str() +
                    "' for 'sm_80'\nptxas         .     24 bytes stack frame, 8 bytes spill stores, 4 bytes spill "
                    "loads\nptxas info    : Used 40 registers, used 1 barriers, 100 bytes smem\n";
  }
  std::string all_options;
  for (int i = 0; i < count; ++i) all_options += std::string(" ") + options[i];
  if (const char* const compiler = std::getenv("FAKE_NVRTC_COMPILER"); compiler != nullptr) {
    return compile_by(compiler, *program, all_options) ? 0 : 6;
  }
  program->cubin = "cubin" + all_options + "\n" + program->text;
  return 0;
}
EXPORT int nvrtcGetProgramLogSize(Program* program, std::size_t* bytes) {
  *bytes = program->log.size() + 1;
  return 0;
}
EXPORT int nvrtcGetProgramLog(Program* program, char* log) {
  std::strcpy(log, program->log.c_str());
  return 0;
}
EXPORT int nvrtcGetCUBINSize(Program* program, std::size_t* bytes) {
  *bytes = program->cubin.size();
  return 0;
}
EXPORT int nvrtcGetCUBIN(Program* program, char* cubin) {
  program->cubin.copy(cubin, program->cubin.size());
  return 0;
}
