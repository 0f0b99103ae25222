// Checks of single option values that CLI11's own do not make: they let NaN through, or crowd the help.
#ifndef VICUS_CLI_VALIDATORS_H_
#define VICUS_CLI_VALIDATORS_H_

#include <CLI/App.hpp>
#include <string>

namespace vicus::cli {

/// Numbers from `least` to `most`; NaN is none.
[[nodiscard]] inline CLI::Validator within(double least, double most) {
  return CLI::Validator(
      [least, most](std::string& text) {
        double value = 0;
        if (CLI::detail::lexical_cast(text, value) && least <= value && value <= most) return std::string();
        return "'" + text + "' is not allowed; allowed: numbers from " + CLI::detail::to_string(least) + " to " +
               CLI::detail::to_string(most);
      },
      "");
}

[[nodiscard]] inline CLI::Validator not_empty() {
  return CLI::Validator(
      [](std::string& text) {
        return text.empty() ? std::string("'' is not allowed; allowed: a name") : std::string();
      },
      "");
}

}  // namespace vicus::cli

#endif  // VICUS_CLI_VALIDATORS_H_
