// Problems of a benchmark file: name, what the library is asked for. Speed targets in the same file are cpu.py's.
#ifndef VICUS_BENCH_BENCH_PROBLEM_H_
#define VICUS_BENCH_BENCH_PROBLEM_H_

#include <string>
#include <vector>

#include "vicus/problem.h"

namespace vicus::bench {

struct BenchProblem {
  std::string name;
  Problem
      problem;  ///< validated; windows without stride, dilation or bias, dense masks full or causal from the top left
};

/// Reads a problem file. Throws std::runtime_error naming the file, and InvalidArgument on a problem that is not legal.
std::vector<BenchProblem> read_problems(const std::string& path);

}  // namespace vicus::bench

#endif  // VICUS_BENCH_BENCH_PROBLEM_H_
