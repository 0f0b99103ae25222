// Problems out of a file, in the form that `vicus plan --json` prints them.
#ifndef VICUS_CLI_PROBLEM_JSON_H_
#define VICUS_CLI_PROBLEM_JSON_H_

#include <string>
#include <string_view>
#include <vector>

#include "vicus/problem.h"

namespace vicus::cli {

/// A problem, and where it came from: "problems.json, line 3".
struct PlacedProblem {
  Problem problem;
  std::string place;
};

/// `text` holds JSON objects, one after the other (one a line, or each over several lines), or arrays of them. An object is
/// a problem, or a plan that has one under "problem". "layout" and "mask" must be there, what else is left out is as in
/// `Problem`. Every problem is validated. `name` is the file's.
/// Throws FormatError for what is no JSON, and InvalidArgument for the rest, naming line and field.
[[nodiscard]] std::vector<PlacedProblem> parse_problems(std::string_view text, const std::string& name);

}  // namespace vicus::cli

#endif  // VICUS_CLI_PROBLEM_JSON_H_
