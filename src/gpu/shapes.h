// The ways to build kernels among which the planner chooses: what won where it was measured on an H100 (notes/gpu.md), and
// keeps to its registers.
#ifndef VICUS_GPU_SHAPES_H_
#define VICUS_GPU_SHAPES_H_

#include <cstdint>
#include <span>

#include "gpu/spec.h"

namespace vicus::gpu {

inline constexpr int kMostPlainHeadDim = 512;

/// A way to build a kernel with tensor cores, for head dims up to `head_dim`.
struct Shape {  // NOLINT(clang-analyzer-optin.performance.Padding): in the order in which the tables are read
  int head_dim, warps, row_blocks, stages;
  int most_queries, most_keys;  // of a tile; of the part that a warp meets, where warps meet parts
  int blocks;                   // per multiprocessor, as far as registers go
  double slowness;              // time of a product, relative
  enum Problems : std::uint8_t {
    all,
    dense,
    unbiased,
    parts
  } of = all;  // parts: windows, and warps meet parts of tiles
  int splits = 1, chunk = 16;
  bool hold = true;
  int turns = 1;
};
inline constexpr Shape kForward[] = {
    {64, 4, 2, 2, 128, 80, 2, 0.93, Shape::dense},
    {64, 4, 2, 2, 128, 64, 2, 1.0, Shape::unbiased},
    {64, 4, 1, 2, 64, 64, 3, 1.15},
    {64, 4, 1, 1, 64, 112, 4, 0.75, Shape::parts},
    {64, 4, 1, 2, 64, 80, 3, 0.75, Shape::parts},
    {64, 4, 1, 2, 64, 112, 2, 0.75, Shape::parts, 1, 16, true, 2},
    {128, 4, 2, 2, 128, 64, 2, 1.0, Shape::dense},
    {128, 4, 2, 2, 128, 32, 2, 1.0, Shape::unbiased},
    {128, 4, 1, 2, 64, 64, 2, 1.4},
    {128, 4, 1, 1, 64, 112, 2, 0.9, Shape::parts},
    {128, 4, 1, 2, 64, 64, 2, 0.9, Shape::parts},
    {256, 4, 1, 2, 64, 32, 1, 1.5},
};
inline constexpr Shape kBackwardQueries[] = {
    {64, 4, 2, 2, 128, 64, 2, 1.0, Shape::unbiased},
    {64, 4, 1, 2, 64, 64, 3, 1.15, Shape::unbiased},
    {64, 4, 1, 2, 64, 64, 1, 1.3},
    {64, 4, 1, 1, 64, 160, 4, 0.9, Shape::parts},
    {64, 4, 1, 2, 64, 80, 4, 0.9, Shape::parts},
    {64, 4, 2, 2, 128, 112, 2, 0.9, Shape::parts},
    {128, 8, 2, 2, 256, 32, 1, 1.0, Shape::dense, 1, 32, false},
    {128, 4, 1, 2, 64, 64, 1, 1.2},
    {240, 4, 1, 2, 64, 32, 1, 1.0, Shape::all, 1, 16, false},
    {256, 4, 1, 2, 64, 32, 1, 1.0, Shape::unbiased, 1, 16, false},
    {256, 4, 1, 2, 64, 16, 1, 1.2, Shape::all, 1, 16, false},
};
inline constexpr Shape kBackwardKeys[] = {
    {64, 4, 2, 2, 64, 128, 2, 1.0, Shape::dense, 1, 32, false},
    {64, 4, 2, 2, 64, 128, 2, 1.1, Shape::unbiased, 1, 16, false},
    {64, 4, 1, 2, 64, 64, 3, 1.05, Shape::unbiased, 1, 16, false},
    {64, 4, 1, 2, 64, 64, 1, 1.3},
    {64, 4, 1, 1, 176, 64, 3, 0.95, Shape::parts},
    {64, 4, 1, 2, 160, 64, 3, 0.95, Shape::parts},
    {128, 8, 1, 2, 64, 128, 1, 1.0, Shape::dense},
    {128, 8, 1, 2, 32, 128, 1, 1.2, Shape::unbiased, 1, 16, false},
    {128, 8, 1, 2, 32, 64, 1, 1.5, Shape::all, 2, 16, false},
    {240, 8, 1, 2, 32, 64, 1, 1.0, Shape::all, 2, 16, false},
    {256, 8, 1, 2, 32, 64, 1, 1.0, Shape::unbiased, 2, 16, false},
    {256, 8, 1, 2, 64, 32, 1, 1.3, Shape::all, 4, 16, false},
};
/// Where query gradients are summed on the way: more registers.
inline constexpr Shape kBackwardKeysAdding[] = {
    {64, 4, 2, 2, 64, 128, 2, 1.0, Shape::dense, 1, 16, false},
    {64, 4, 1, 2, 64, 64, 2, 1.1, Shape::unbiased, 1, 16, false},
    {64, 4, 1, 2, 64, 64, 1, 1.3},
    {128, 8, 1, 2, 64, 128, 1, 1.0, Shape::dense, 1, 32, false},
    {128, 8, 1, 2, 32, 128, 1, 1.2, Shape::unbiased, 1, 16, false},
    {128, 8, 1, 2, 32, 64, 1, 1.5, Shape::all, 2, 16, false},
};
inline constexpr int kMostHeadDim = 256;

/// A way to build a plain kernel, for head dims up to `head_dim`; `Shape` explains the rest. Head dims up to `whole` are
/// multiplied in one piece, longer ones `part` features at a time, and give `wide_part` of results at a time.
struct PlainShape {  // NOLINT(clang-analyzer-optin.performance.Padding): as above
  int head_dim, warps, thread_rows, most_queries, most_keys, blocks;
  double slowness;
  int whole, part, wide_part;
  int most_rank = 3;  ///< positions of more axes, biases and additional tokens take registers
  bool biased_or_more = true;
};
/// By bytes of storage. The last ones need least registers and shared memory.
inline constexpr PlainShape kPlainForward32[] = {
    {64, 4, 8, 128, 64, 2, 1.0, 128, 64, 128, 1, false},   {64, 4, 8, 128, 32, 2, 1.08, 128, 64, 128, 2},
    {64, 4, 4, 64, 64, 3, 1.35, 128, 64, 128, 1},          {64, 4, 4, 64, 64, 2, 1.4, 128, 64, 128},
    {128, 8, 4, 128, 64, 1, 1.15, 128, 64, 128, 3, false}, {128, 4, 4, 64, 32, 2, 1.4, 128, 64, 128, 3, false},
    {128, 4, 4, 64, 32, 1, 1.5, 128, 64, 128, 2},          {kMostPlainHeadDim, 4, 4, 64, 64, 1, 1.9, 64, 64, 128},
    {kMostPlainHeadDim, 4, 4, 64, 32, 1, 2.5, 64, 64, 64},
};
inline constexpr PlainShape kPlainForward16[] = {{128, 4, 4, 64, 64, 1, 1.0, 128, 64, 128},
                                                 {kMostPlainHeadDim, 4, 4, 64, 64, 1, 1.3, 64, 64, 128},
                                                 {kMostPlainHeadDim, 4, 4, 64, 32, 1, 1.7, 64, 64, 64}};
inline constexpr PlainShape kPlainForward64[] = {{kMostPlainHeadDim, 4, 4, 64, 32, 1, 1.0, 64, 32, 64}};
inline constexpr PlainShape kPlainQueries[] = {{64, 4, 8, 128, 32, 2, 1.0, 64, 64, 64, 1, false},
                                               {64, 4, 4, 64, 64, 2, 1.13, 64, 64, 64, 1, false},
                                               {64, 4, 4, 64, 32, 2, 1.2, 64, 64, 64},
                                               {128, 4, 4, 64, 32, 1, 1.1, 128, 64, 64, 3, false},
                                               {128, 4, 4, 64, 32, 1, 1.1, 128, 64, 64, 2},
                                               {kMostPlainHeadDim, 8, 4, 128, 32, 1, 1.5, 128, 128, 128, 1, false},
                                               {kMostPlainHeadDim, 4, 4, 64, 32, 1, 2.2, 64, 64, 64}};
inline constexpr PlainShape kPlainKeys[] = {{64, 4, 4, 64, 64, 2, 1.0, 64, 64, 64, 1, false},
                                            {64, 4, 4, 32, 64, 2, 1.12, 64, 64, 64},
                                            {128, 4, 4, 32, 64, 1, 1.1, 128, 64, 64, 1, false},
                                            {kMostPlainHeadDim, 8, 4, 32, 128, 1, 1.5, 128, 128, 128, 1, false},
                                            {kMostPlainHeadDim, 4, 4, 32, 64, 1, 2.2, 64, 64, 64}};
inline constexpr PlainShape kPlainGradients64[] = {{kMostPlainHeadDim, 4, 2, 32, 32, 1, 1.0, 64, 32, 32}};

inline std::span<const PlainShape> plain_shapes(Kernel kernel, DType dtype) {
  if (dtype == DType::float64) {
    return kernel == Kernel::plain_forward ? std::span(kPlainForward64) : std::span(kPlainGradients64);
  }
  if (kernel == Kernel::plain_queries) return kPlainQueries;
  if (kernel == Kernel::plain_keys) return kPlainKeys;
  return dtype == DType::float32 ? std::span<const PlainShape>(kPlainForward32) : kPlainForward16;
}

}  // namespace vicus::gpu

#endif  // VICUS_GPU_SHAPES_H_
