#include "jit/nvrtc.h"

#include <atomic>
#include <filesystem>
#include <memory>
#include <mutex>

#include "jit/library.h"
#include "vicus/error.h"

namespace vicus::jit {

/// The search of the header comment. What was tried and why it failed goes into the error.
class NvrtcSearch {
 public:
  [[nodiscard]] std::unique_ptr<Nvrtc> run(const std::vector<std::string>& package_directories) {
    if (const std::string chosen = environment("VICUS_NVRTC"); !chosen.empty()) {
      std::error_code ignored;
      const bool directory = std::filesystem::is_directory(chosen, ignored);
      auto found = directory ? try_directory(chosen, "VICUS_NVRTC") : try_file(chosen, "VICUS_NVRTC");
      if (found == nullptr) fail("VICUS_NVRTC is " + chosen + ", but " + (error_.empty() ? "has none" : error_));
      return found;
    }
    for (const std::string& name : names()) {
      if (const Library library = Library::in_process(name)) {
        if (auto found = use(library, "the process")) return found;
      }
    }
    for (const std::string& directory : package_directories) {
      if (auto found = try_directory(directory, "the Python packages")) return found;
    }
    for (const char* const variable : {"CUDA_HOME", "CUDA_PATH"}) {
      const std::string home = environment(variable);
      if (home.empty()) continue;
      for (const char* const below : {"/lib64", "/lib"}) {
        if (auto found = try_directory(home + below, variable)) return found;
      }
    }
    for (const std::string& name : names()) {
      if (auto found = try_file(name, "the system")) return found;
    }
    if (auto found = try_directory("/usr/local/cuda/lib64", "the system")) return found;
    fail(
        "not in the process, the Python packages, CUDA_HOME, CUDA_PATH or the system; install the Python package "
        "nvidia-cuda-nvrtc or name the library in VICUS_NVRTC" +
        (error_.empty() ? "" : " (" + error_ + ")"));
  }

 private:
  [[noreturn]] static void fail(const std::string& why) {
    throw Unsupported("GPU kernels are compiled by libnvrtc, which was not found: " + why);
  }

  /// Names of the library, newest first. Versions to come are in the list as far as their naming can be foreseen.
  static const std::vector<std::string>& names() {
    static const std::vector<std::string> list = [] {
      std::vector<std::string> all;
      for (int major = 19; major >= 12; --major) all.push_back("libnvrtc.so." + std::to_string(major));
      all.emplace_back("libnvrtc.so.11.2");
      return all;
    }();
    return list;
  }

  std::unique_ptr<Nvrtc> try_directory(const std::string& directory, const std::string& place) {
    for (const std::string& name : names()) {
      const std::string file = std::filesystem::path(directory) / name;
      std::error_code ignored;
      if (!std::filesystem::exists(file, ignored)) continue;
      if (auto found = try_file(file, place)) return found;
    }
    return nullptr;
  }

  std::unique_ptr<Nvrtc> try_file(const std::string& file, const std::string& place) {
    std::string error;
    if (const Library library = Library::open(file, &error)) return use(library, place);
    if (file.find('/') != std::string::npos) error_ = error;  // of mere names, most are not expected to be there
    return nullptr;
  }

  std::unique_ptr<Nvrtc> use(const Library& library, const std::string& place) {
    auto found = std::make_unique<Nvrtc>();
    Nvrtc& n = *found;
    const bool complete = library.resolve(n.nvrtcVersion, "nvrtcVersion") &&
                          library.resolve(n.nvrtcGetNumSupportedArchs, "nvrtcGetNumSupportedArchs") &&
                          library.resolve(n.nvrtcGetSupportedArchs, "nvrtcGetSupportedArchs") &&
                          library.resolve(n.nvrtcGetErrorString, "nvrtcGetErrorString") &&
                          library.resolve(n.nvrtcCreateProgram, "nvrtcCreateProgram") &&
                          library.resolve(n.nvrtcDestroyProgram, "nvrtcDestroyProgram") &&
                          library.resolve(n.nvrtcCompileProgram, "nvrtcCompileProgram") &&
                          library.resolve(n.nvrtcGetProgramLogSize, "nvrtcGetProgramLogSize") &&
                          library.resolve(n.nvrtcGetProgramLog, "nvrtcGetProgramLog") &&
                          library.resolve(n.nvrtcGetCUBINSize, "nvrtcGetCUBINSize") &&
                          library.resolve(n.nvrtcGetCUBIN, "nvrtcGetCUBIN");
    int major = 0, minor = 0, count = 0;
    if (!complete || n.nvrtcVersion(&major, &minor) != 0 || n.nvrtcGetNumSupportedArchs(&count) != 0) {
      error_ = "a library in " + place + " is not libnvrtc 11.2 or later";
      return nullptr;
    }
    n.architectures_.resize(static_cast<std::size_t>(count));
    if (n.nvrtcGetSupportedArchs(n.architectures_.data()) != 0) n.architectures_.clear();
    n.version_ = std::to_string(major) + "." + std::to_string(minor);
    n.caches_ = major > 12 || (major == 12 && minor >= 9);
    n.path_ = library.path_of("nvrtcVersion");
    n.found_in_ = place;
    return found;
  }

  std::string error_;  // of the last file that was there and did not open
};

namespace {

struct Shared {
  std::mutex mutex;
  std::vector<std::string> package_directories;
  std::unique_ptr<Nvrtc> found;
};

Shared& shared() {
  static Shared state;
  return state;
}

}  // namespace

const Nvrtc& nvrtc() {
  Shared& state = shared();
  const std::lock_guard lock(state.mutex);
  if (state.found == nullptr) state.found = NvrtcSearch().run(state.package_directories);
  return *state.found;
}

void set_nvrtc_directory(const std::string& directory) {
  Shared& state = shared();
  const std::lock_guard lock(state.mutex);
  state.package_directories.push_back(directory);
}

/// One program of NVRTC, destroyed whatever happens.
class Nvrtc::Job {
 public:
  explicit Job(const Nvrtc& nvrtc) : nvrtc_(nvrtc) {}
  ~Job() {
    if (program != nullptr) nvrtc_.nvrtcDestroyProgram(&program);
  }
  Job(Job&&) = delete;
  Job(const Job&) = delete;
  Job& operator=(Job&&) = delete;
  Job& operator=(const Job&) = delete;

  /// A text that NVRTC gives in two calls, its size and its bytes.
  template <class Size, class Get>
  [[nodiscard]] std::string text(Size size_of, Get get) const {
    std::size_t bytes = 0;
    if (size_of(program, &bytes) != 0) return {};
    std::string result(bytes, '\0');
    if (get(program, result.data()) != 0) return {};
    return result;
  }

  Program program = nullptr;

 private:
  const Nvrtc& nvrtc_;
};

Nvrtc::Result Nvrtc::compile(const std::string& name, const std::string& text, const std::vector<EmbeddedFile>& headers,
                             const std::vector<std::string>& options) const {
  std::vector<const char*> texts, names, option_list;
  for (const EmbeddedFile& header : headers) {
    texts.push_back(header.text);
    names.push_back(header.name);
  }
  std::string joined;
  for (const std::string& option : options) {
    option_list.push_back(option.c_str());
    joined += " " + option;
  }
  if (caches_) option_list.push_back("--no-cache");
  Job job(*this);
  const std::string program_name = "constants of " + name;  // an #include of `name` must not find the program itself
  int status = nvrtcCreateProgram(&job.program, text.c_str(), program_name.c_str(), static_cast<int>(headers.size()),
                                  texts.data(), names.data());
  if (status == 0) status = nvrtcCompileProgram(job.program, static_cast<int>(option_list.size()), option_list.data());
  std::string log;
  if (job.program != nullptr) {
    log = job.text(nvrtcGetProgramLogSize, nvrtcGetProgramLog);
    if (const std::size_t end = log.find('\0'); end != std::string::npos) log.resize(end);
  }
  if (status != 0) {
    throw CompileError(name + " does not compile (NVRTC " + version_ + ": " + nvrtcGetErrorString(status) +
                           "; options:" + joined + ")",
                       std::move(log));
  }
  std::string cubin = job.text(nvrtcGetCUBINSize, nvrtcGetCUBIN);
  if (cubin.empty()) throw CompileError(name + " compiled to nothing (NVRTC " + version_ + ";" + joined + ")", log);
  return {std::move(cubin), std::move(log)};
}

}  // namespace vicus::jit
