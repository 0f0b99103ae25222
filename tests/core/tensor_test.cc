// Tensor views and layouts, element types, per-axis values, names of engines, errors.
#include <array>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "testing.h"

namespace vicus {
namespace {

using testing::expect_invalid;
using Shape = std::vector<std::int64_t>;

Shape shape_of(const TensorLayout& layout) { return {layout.shape().begin(), layout.shape().end()}; }
Shape strides_of(const TensorLayout& layout) { return {layout.strides().begin(), layout.strides().end()}; }

TEST(DTypes, SizesAndNames) {
  EXPECT_EQ(dtype_size(DType::float32), 4U);
  EXPECT_EQ(dtype_size(DType::float64), 8U);
  EXPECT_EQ(dtype_size(DType::bfloat16), 2U);
  EXPECT_EQ(dtype_size(DType::float16), 2U);
  EXPECT_EQ(dtype_name(DType::float32), "float32");
  EXPECT_EQ(dtype_name(DType::float64), "float64");
  EXPECT_EQ(dtype_name(DType::bfloat16), "bfloat16");
  EXPECT_EQ(dtype_name(DType::float16), "float16");
}

TEST(DTypes, ParseIsTheInverseOfName) {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    EXPECT_EQ(parse_dtype(dtype_name(dtype)), dtype);
  }
}

TEST(DTypes, ParseRefusesOtherNames) {
  expect_invalid([] { (void)parse_dtype("float"); }, "dtype", "'float'", "float32, float64, bfloat16, float16");
  expect_invalid([] { (void)parse_dtype("", "--dtype"); }, "--dtype", "''", "float32");
  expect_invalid([] { (void)parse_dtype("Float32"); }, "dtype", "'Float32'", "float32");
}

TEST(Engines, ParseIsTheInverseOfName) {
  EXPECT_EQ(engine_name(Engine::automatic), "auto");
  EXPECT_EQ(engine_name(Engine::reference), "reference");
  EXPECT_EQ(engine_name(Engine::cpu), "cpu");
  for (const Engine engine : {Engine::automatic, Engine::reference, Engine::cpu}) {
    EXPECT_EQ(parse_engine(engine_name(engine)), engine);
  }
  expect_invalid([] { (void)parse_engine("fast", "--engine"); }, "--engine", "'fast'", "auto, reference, cpu");
}

TEST(Layouts, ContiguousStridesAreRowMajor) {
  const TensorLayout layout(Shape{2, 3, 4, 5});
  EXPECT_EQ(layout.dims(), 4);
  EXPECT_EQ(shape_of(layout), (Shape{2, 3, 4, 5}));
  EXPECT_EQ(strides_of(layout), (Shape{60, 20, 5, 1}));
  EXPECT_EQ(layout.numel(), 120);
  EXPECT_EQ(layout.size(1), 3);
  EXPECT_EQ(layout.stride(1), 20);
}

TEST(Layouts, NoDimensionIsOneElement) {
  EXPECT_EQ(TensorLayout().dims(), 0);
  EXPECT_EQ(TensorLayout().numel(), 1);
}

TEST(Layouts, EmptyExtentsHaveNoElements) {
  const TensorLayout layout(Shape{2, 0, 3});
  EXPECT_EQ(layout.numel(), 0);
  EXPECT_EQ(layout.stride(2), 1);
}

TEST(Layouts, StridesAreTakenAsGiven) {
  const TensorLayout layout(Shape{2, 3}, Shape{-7, 0});
  EXPECT_EQ(strides_of(layout), (Shape{-7, 0}));
  EXPECT_EQ(layout.numel(), 6);
}

TEST(Layouts, RefusesWhatCannotBe) {
  expect_invalid([] { TensorLayout(Shape(7, 1)); }, "shape", "7 dimensions", "6");
  expect_invalid([] { TensorLayout(Shape{2, -1}); }, "shape[1]", "-1", ">= 0");
  expect_invalid([] { TensorLayout(Shape{2, 3}, Shape{1}); }, "strides", "1 values", "2");
  expect_invalid([] { TensorLayout(Shape{std::numeric_limits<std::int64_t>::max(), 2}); }, "shape", "a product",
                 "2^63 - 1");
}

TEST(Layouts, SixDimensionsFit) { EXPECT_EQ(TensorLayout(Shape{1, 2, 3, 4, 5, 6}).numel(), 720); }

TEST(Views, DefaultIsAbsent) {
  const ConstTensorView view;
  EXPECT_FALSE(view.present());
  EXPECT_FALSE(view);
  EXPECT_EQ(view.data(), nullptr);
}

TEST(Views, TakeTheirTypeFromThePointer) {
  std::array<float, 6> floats{};
  const std::array<double, 6> doubles{};
  const TensorView written(floats.data(), {2, 3});
  const ConstTensorView read(doubles.data(), {6});
  EXPECT_EQ(written.dtype(), DType::float32);
  EXPECT_EQ(read.dtype(), DType::float64);
  EXPECT_TRUE(written);
  EXPECT_EQ(written.data(), floats.data());
  EXPECT_EQ(strides_of(written), (Shape{3, 1}));
}

TEST(Views, WhatIsWrittenCanBeRead) {
  std::array<std::uint16_t, 8> halves{};
  const TensorView written(halves.data(), DType::bfloat16, {2, 2, 2}, {4, 1, 2});
  const ConstTensorView read = written;
  EXPECT_EQ(read.data(), halves.data());
  EXPECT_EQ(read.dtype(), DType::bfloat16);
  EXPECT_EQ(strides_of(read), (Shape{4, 1, 2}));
  EXPECT_TRUE(read.present());
  EXPECT_FALSE(ConstTensorView(TensorView()).present());
}

TEST(Views, AnEmptyTensorIsPresentWithoutData) {
  const ConstTensorView view(nullptr, DType::float32, {0, 4});
  EXPECT_TRUE(view.present());
  EXPECT_EQ(view.numel(), 0);
}

TEST(AxisValues, OneValueAnswersForEveryAxis) {
  const AxisValues one = 7;
  EXPECT_EQ(one.size(), 1);
  for (const int axis : {0, 1, 2}) EXPECT_EQ(one[axis], 7);
  EXPECT_EQ(one.text(), "(7)");
}

TEST(AxisValues, SeveralValuesKeepTheirOrder) {
  const AxisValues three = {3, 5, 7};
  EXPECT_EQ(three.size(), 3);
  EXPECT_EQ(three[0], 3);
  EXPECT_EQ(three[1], 5);
  EXPECT_EQ(three[2], 7);
  EXPECT_EQ(three.text(), "(3, 5, 7)");
  EXPECT_NE(three, (AxisValues{3, 5}));
  EXPECT_EQ(three, AxisValues(std::span<const std::int64_t>(std::array<std::int64_t, 3>{3, 5, 7})));
}

TEST(AxisValues, EmptyAndTooMany) {
  EXPECT_TRUE(AxisValues().empty());
  EXPECT_EQ(AxisValues().text(), "()");
  EXPECT_FALSE(AxisValues(1).empty());
  EXPECT_THROW((AxisValues{1, 2, 3, 4}), InvalidArgument);
}

TEST(Errors, ReadAsOneSentence) {
  const InvalidArgument error("kernel_size[1]", "0", "1 to 56");
  EXPECT_STREQ(error.what(), "kernel_size[1] is 0; allowed: 1 to 56");
  EXPECT_EQ(error.argument(), "kernel_size[1]");
  const std::exception& base = error;
  EXPECT_STREQ(base.what(), error.what());
}

TEST(Info, VersionIsThreeNumbers) {
  int major = -1, minor = -1, patch = -1, length = 0;
  const std::string text(version());
  ASSERT_EQ(std::sscanf(text.c_str(), "%d.%d.%d%n", &major, &minor, &patch, &length), 3) << text;
  EXPECT_EQ(static_cast<std::size_t>(length), text.size()) << text;
}

}  // namespace
}  // namespace vicus
