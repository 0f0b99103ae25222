// What the library throws. It never prints, exits or aborts on bad input, and throws before anything is written.
#ifndef VICUS_ERROR_H_
#define VICUS_ERROR_H_

#include <stdexcept>
#include <string>

#include "vicus/export.h"

namespace vicus {

/// An argument breaks a rule. `what()` reads "<argument> is <got>; allowed: <allowed>".
class VICUS_API InvalidArgument : public std::invalid_argument {
 public:
  InvalidArgument(std::string argument, const std::string& got, const std::string& allowed)
      : std::invalid_argument(argument + " is " + got + "; allowed: " + allowed), argument_(std::move(argument)) {}
  /// Name of the offending argument, as the caller wrote it: "kernel_size[1]", "key.shape[3]".
  [[nodiscard]] const std::string& argument() const noexcept { return argument_; }
  /// The same of an argument that is part of `whole`: "problems[2].heads".
  [[nodiscard]] InvalidArgument within(const std::string& whole, const std::string& separator = ".") const {
    const std::string text = what();
    return {whole + separator + argument_, Rest{whole + separator + text}};
  }

 private:
  struct Rest {
    std::string what;
  };
  InvalidArgument(std::string argument, const Rest& rest)
      : std::invalid_argument(rest.what), argument_(std::move(argument)) {}
  std::string argument_;
};

/// The arguments are legal, but the engine asked for does not take them; `what()` says why and what does.
class VICUS_API Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A call of the CUDA driver failed; `what()` names the call, the code and what was being done.
class VICUS_API DriverError : public std::runtime_error {
 public:
  DriverError(std::string call, int code, const std::string& text)
      : std::runtime_error(call + " failed: " + text), call_(std::move(call)), code_(code) {}
  [[nodiscard]] const std::string& call() const noexcept { return call_; }
  /// The driver's CUresult.
  [[nodiscard]] int code() const noexcept { return code_; }

 private:
  std::string call_;
  int code_;
};

/// A GPU kernel did not compile; `what()` ends with the compiler's log.
class VICUS_API CompileError : public std::runtime_error {
 public:
  CompileError(const std::string& text, std::string log)
      : std::runtime_error(text + "\n" + log), log_(std::move(log)) {}
  [[nodiscard]] const std::string& log() const noexcept { return log_; }

 private:
  std::string log_;
};

}  // namespace vicus

#endif  // VICUS_ERROR_H_
