// Right before fast: compares what the engine left in the timed tensors themselves with naive float64 loops, at sampled
// queries and keys, so that a problem of any size is checked at its full size.
#ifndef VICUS_BENCH_SAMPLED_CHECK_H_
#define VICUS_BENCH_SAMPLED_CHECK_H_

#include <string>

#include "tensors.h"
#include "vicus/problem.h"

namespace vicus::bench {

/// Largest error of each result over the samples, as a share of the largest value sampled of that result.
struct CheckErrors {
  double output = 0, logsumexp = 0, grad_query = 0, grad_key = 0, grad_value = 0;
  /// Empty when all are within the rounding of `dtype`, otherwise which one is not and by how much.
  [[nodiscard]] std::string complaint(DType dtype) const;
};

/// `tensors` hold the results of a forward call, and of a backward call where `backward`. Problems as in bench_problem.h.
CheckErrors sampled_check(const Problem& problem, const ProblemTensors& tensors, int samples, bool backward);

}  // namespace vicus::bench

#endif  // VICUS_BENCH_SAMPLED_CHECK_H_
