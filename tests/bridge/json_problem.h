// Problems, plans and tensors as the Python tests describe them.
#ifndef VICUS_TESTS_BRIDGE_JSON_PROBLEM_H_
#define VICUS_TESTS_BRIDGE_JSON_PROBLEM_H_

#include <cstdint>
#include <nlohmann/json.hpp>

#include "vicus/vicus.hpp"

extern "C" {
/// One array of the caller: strides in elements.
struct VicusBridgeTensor {
  const char* name;
  void* data;
  const char* dtype;
  std::int32_t dims;
  const std::int64_t* shape;
  const std::int64_t* strides;
};
}

namespace vicus::bridge {

using Json = nlohmann::json;

/// Absent members keep the defaults of the header; members it does not know are errors of the test.
Neighborhood neighborhood_from(const Json& json);
Dense dense_from(const Json& json);
Problem problem_from(const Json& json);
PlanOptions options_from(const Json& json);

Json to_json(const Problem& problem);
Json to_json(const Plan& plan);

/// Throws what the library throws on a bad description.
TensorView view_of(const VicusBridgeTensor& tensor);

}  // namespace vicus::bridge

#endif  // VICUS_TESTS_BRIDGE_JSON_PROBLEM_H_
