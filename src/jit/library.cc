#include "jit/library.h"

#include <dlfcn.h>

#include <cstdlib>

namespace vicus::jit {

Library Library::open(const std::string& name, std::string* error) {
  Library library;
  library.handle_ = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library.handle_ == nullptr && error != nullptr) {
    const char* const text = ::dlerror();
    *error = text == nullptr ? "cannot open " + name : text;
  }
  return library;
}

Library Library::in_process(const std::string& name) {
  Library library;
  library.handle_ = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  return library;
}

void* Library::find(const char* symbol) const { return ::dlsym(handle_, symbol); }

std::string Library::path_of(const char* symbol) const {
  Dl_info info{};
  void* const address = find(symbol);
  return address != nullptr && ::dladdr(address, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

std::string environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace vicus::jit
