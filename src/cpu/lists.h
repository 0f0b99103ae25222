// Two vector primitives over lists of rows, for the operators whose scores lie in memory: dot products of one row with
// many, and weighted sums of many rows. On the best target of this machine. float64 rows are computed in float64, all
// others in float32.
#ifndef VICUS_CPU_LISTS_H_
#define VICUS_CPU_LISTS_H_

#include <cstdint>

#include "vicus/tensor.h"

namespace vicus::cpu {

/// out[i] = row . rows[i], each of `width` elements of `dtype`; out is float, or double for float64.
void dot_list(DType dtype, const void* row, const void* const* rows, int count, int width, void* out);

/// out = sum_i weights[i] * rows[i], stored as `dtype`; `sums` is scratch of `width` rounded up to 16 elements. Weights
/// and sums are float, or double for float64. A row with weight 0 is not read.
void sum_list(DType dtype, const void* const* rows, const void* weights, int count, int width, void* sums, void* out);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_LISTS_H_
