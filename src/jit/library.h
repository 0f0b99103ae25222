// A shared library opened at run time. It stays open: code of it may be on the stack of any thread at exit.
#ifndef VICUS_JIT_LIBRARY_H_
#define VICUS_JIT_LIBRARY_H_

#include <string>

namespace vicus::jit {

class Library {
 public:
  Library() = default;
  /// Opens `name` as dlopen does: a path, or a name that the loader looks for. Not `*this` when it cannot; see `error`.
  [[nodiscard]] static Library open(const std::string& name, std::string* error = nullptr);
  /// `name` if the process has it open already.
  [[nodiscard]] static Library in_process(const std::string& name);

  explicit operator bool() const noexcept { return handle_ != nullptr; }

  /// Sets `function` to the symbol, or to null.
  template <class Function>
  bool resolve(Function*& function, const char* symbol) const {
    function = reinterpret_cast<Function*>(find(symbol));
    return function != nullptr;
  }

  /// The file that holds `symbol`.
  [[nodiscard]] std::string path_of(const char* symbol) const;

 private:
  [[nodiscard]] void* find(const char* symbol) const;
  void* handle_ = nullptr;
};

/// The environment variable, or an empty text.
[[nodiscard]] std::string environment(const char* name);

}  // namespace vicus::jit

#endif  // VICUS_JIT_LIBRARY_H_
