#include "bench_problem.h"

#include <cstdint>
#include <fstream>
#include <span>
#include <stdexcept>

#include <nlohmann/json.hpp>

namespace vicus::bench {
namespace {

AxisValues axis_values(const nlohmann::json& list) {
  const auto values = list.get<std::vector<std::int64_t>>();
  return AxisValues(std::span<const std::int64_t>(values));
}

Problem read_problem(const nlohmann::json& entry) {
  Problem problem;
  problem.dtype = parse_dtype(entry.value("dtype", "float32"));
  problem.batch = entry.value("batch", std::int64_t{1});
  problem.layout = axis_values(entry.at("layout"));
  problem.heads = entry.at("heads").get<std::int64_t>();
  problem.head_dim = entry.at("head_dim").get<std::int64_t>();
  const auto mask = entry.at("mask").get<std::string>();
  if (mask == "dense") {
    Dense dense;
    dense.keys = problem.layout[0];
    dense.causal = entry.value("causal", false) ? Causal::top_left : Causal::none;
    problem.mask = dense;
  } else if (mask == "neighborhood") {
    Neighborhood neighborhood;
    neighborhood.kernel_size = axis_values(entry.at("kernel_size"));
    problem.mask = neighborhood;
  } else {
    throw std::runtime_error("mask is " + mask + "; allowed: dense, neighborhood");
  }
  return validate(problem);
}

}  // namespace

std::vector<BenchProblem> read_problems(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("problems is " + path + "; allowed: a file that can be read");
  std::vector<BenchProblem> problems;
  try {
    const auto document = nlohmann::json::parse(file);
    for (const auto& entry : document.at("problems")) {
      problems.push_back({entry.at("name").get<std::string>(), read_problem(entry)});
    }
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
  return problems;
}

}  // namespace vicus::bench
