// Any bytes as a file of problems: an error that names the file, or problems that are printed and read back as they were.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cli/format.h"
#include "cli/plan_json.h"
#include "cli/problem_json.h"
#include "require.h"
#include "vicus/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace vicus::cli;  // NOLINT(google-build-using-namespace): the one function of this file
  std::vector<PlacedProblem> problems;
  try {
    problems = parse_problems({reinterpret_cast<const char*>(data), size}, "x.json");
  } catch (const vicus::InvalidArgument& error) {
    require(error.argument().starts_with("x.json, line "), "the error names the line");
    return 0;
  } catch (const FormatError& error) {
    require(std::string_view(error.what()).starts_with("x.json"), "the error names the file");
    return 0;
  }
  std::string text;
  for (const PlacedProblem& each : problems) text += to_json(each.problem).dump() + "\n";
  const std::vector<PlacedProblem> again = parse_problems(text, "x.json");
  require(again.size() == problems.size(), "as many");
  for (std::size_t i = 0; i < again.size(); ++i) {
    vicus::Problem before = problems[i].problem;
    before.scale = before.effective_scale();
    require(again[i].problem == before, "the same");
  }
  return 0;
}
