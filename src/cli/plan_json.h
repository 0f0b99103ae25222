// Problems and plans as JSON: every field of the structs, under its own name.
#ifndef VICUS_CLI_PLAN_JSON_H_
#define VICUS_CLI_PLAN_JSON_H_

#include <nlohmann/json.hpp>

#include "vicus/plan.h"

namespace vicus::cli {

using Json = nlohmann::ordered_json;

[[nodiscard]] Json to_json(const Problem& problem);
[[nodiscard]] Json to_json(const Plan& plan);

}  // namespace vicus::cli

#endif  // VICUS_CLI_PLAN_JSON_H_
