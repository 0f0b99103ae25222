#include "cli/safetensors.h"

#include <gtest/gtest.h>

#include "bytes.h"

namespace vicus::cli {
namespace {

using testing::Bytes;
using testing::join;
using testing::little_endian;
using testing::safetensors;
using testing::to_bytes;
using Shape = std::vector<std::int64_t>;

std::string error_of(const Bytes& bytes) {
  try {
    (void)parse_safetensors(bytes);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "no error";
}

/// One entry of a header.
std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  std::string text(1, '"');
  text.append(name).append(R"(":{"dtype":")").append(dtype).append(R"(","shape":)").append(shape);
  return text.append(R"(,"data_offsets":)").append(offsets).append("}");
}

/// A file whose header holds these entries.
Bytes file_of(const std::vector<std::string>& entries, std::size_t data_bytes) {
  std::string header(1, '{');
  for (const std::string& entry : entries) header.append(header.size() > 1 ? "," : "").append(entry);
  return safetensors(header.append("}   "), Bytes(data_bytes));
}

TEST(Safetensors, ReadsTensorsInOrderOfTheirData) {
  // The header may list tensors in any order, hold metadata, types of no interest, and end in spaces.
  const Bytes file = file_of({R"("__metadata__":{"format":"pt"})", tensor("b", "BF16", "[2]", "[8,12]"),
                              tensor("a", "F32", "[1,2]", "[0,8]"), tensor("empty", "F64", "[0,7]", "[8,8]"),
                              tensor("scalar", "I64", "[]", "[12,20]"), tensor("new", "F4_E2M1", "[3]", "[20,22]")},
                             22);
  const auto entries = parse_safetensors(file);
  ASSERT_EQ(entries.size(), 5U);
  EXPECT_EQ(entries[0].name, "a");
  EXPECT_EQ(entries[0].dtype, DType::float32);
  EXPECT_EQ(entries[0].shape, (Shape{1, 2}));
  EXPECT_EQ(entries[1].name, "empty");
  EXPECT_EQ(entries[1].data.size(), 0U);
  EXPECT_EQ(entries[2].name, "b");
  EXPECT_EQ(entries[2].dtype, DType::bfloat16);
  EXPECT_EQ(entries[2].data.data() - entries[0].data.data(), 8);
  EXPECT_EQ(entries[3].type, "I64");
  EXPECT_FALSE(entries[3].dtype.has_value());
  EXPECT_FALSE(entries[4].dtype.has_value());
}

TEST(Safetensors, NothingInside) { EXPECT_TRUE(parse_safetensors(safetensors("{}")).empty()); }

TEST(Safetensors, EveryTruncationIsAnError) {
  const Bytes file = file_of({tensor("a", "F32", "[2]", "[0,8]")}, 8);
  for (std::size_t size = 0; size < file.size(); ++size) {
    const Bytes cut(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_NE(error_of(cut), "no error") << size;
  }
  EXPECT_EQ(error_of(file), "no error");
  EXPECT_NE(error_of(join(file, Bytes(1))), "no error") << "bytes that no tensor owns";
}

TEST(Safetensors, HeaderLengthsOutOfRangeAreErrors) {
  for (const std::uint64_t length :
       {std::uint64_t{3}, std::uint64_t{100'000'001}, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    EXPECT_NE(error_of(join(little_endian(length, 8), to_bytes("{}"))), "no error") << length;
  }
}

TEST(Safetensors, MalformedHeadersAreErrors) {
  const std::string headers[] = {
      "",
      " {}",
      "[]",
      "{",
      "{}{}",
      "null",
      "{\"a\":1}",
      "{\"a\":[]}",
      "{\"a\":null}",
      "{\"a\":{}}",
      R"({"a":{"dtype":"F32","shape":[1]}})",
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}})",
      R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
      tensor("a", "F32", "[1]", "[0,4]"),
      R"({"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}})",
      std::string(R"({"a":)").append(100000, '['),
  };
  for (const std::string& header : headers) EXPECT_NE(error_of(safetensors(header, Bytes(4))), "no error") << header;

  const std::string good = tensor("a", "F32", "[1]", "[0,4]");
  const std::vector<std::string> entries[] = {
      {tensor("a", "F32", "[1]", "[0]")},      {tensor("a", "F32", "[1]", "[0,4,4]")},
      {tensor("a", "F32", "[1]", "4")},        {tensor("a", "F32", "1", "[0,4]")},
      {tensor("a", "F32", "[[1]]", "[0,4]")},  {tensor("a", "F32", "[-1]", "[0,4]")},
      {tensor("a", "F32", "[1.0]", "[0,4]")},  {tensor("a", "F32", R"(["1"])", "[0,4]")},
      {tensor("\xff", "F32", "[1]", "[0,4]")}, {good, tensor("a", "F32", "[0]", "[4,4]")},
      {good, R"("__metadata__":{"a":1})"},     {good, R"("__metadata__":"a")"},
  };
  for (const auto& list : entries) EXPECT_NE(error_of(file_of(list, 4)), "no error") << list.back();
  EXPECT_EQ(error_of(file_of({good}, 4)), "no error");
}

TEST(Safetensors, OffsetsMustCoverTheDataOnce) {
  const auto two = [](const std::string& first, const std::string& second) {
    return error_of(file_of({tensor("a", "F32", "[1]", first), tensor("b", "F32", "[1]", second)}, 8));
  };
  EXPECT_EQ(two("[0,4]", "[4,8]"), "no error");
  EXPECT_EQ(two("[4,8]", "[0,4]"), "no error");
  EXPECT_NE(two("[0,4]", "[0,4]"), "no error") << "the same bytes twice";
  EXPECT_NE(two("[0,4]", "[2,6]"), "no error") << "overlap";
  EXPECT_NE(two("[0,4]", "[8,12]"), "no error") << "outside";
  EXPECT_NE(two("[0,4]", "[8,4]"), "no error") << "end before begin";
  EXPECT_NE(two("[1,5]", "[5,9]"), "no error") << "gap at the beginning";
  EXPECT_NE(two("[0,4]", "[18446744073709551615,3]"), "no error") << "wraps around";
}

TEST(Safetensors, SizesMustAgreeWithShapes) {
  const auto one = [](const std::string& dtype, const std::string& shape) {
    return error_of(file_of({tensor("a", dtype, shape, "[0,4]")}, 4));
  };
  EXPECT_EQ(one("F32", "[1]"), "no error");
  EXPECT_EQ(one("BF16", "[2]"), "no error");
  EXPECT_EQ(one("BOOL", "[4]"), "no error");
  EXPECT_NE(one("F32", "[2]"), "no error");
  EXPECT_NE(one("F64", "[1]"), "no error");
  EXPECT_NE(one("F32", "[4611686018427387905]"), "no error") << "wraps around to 4 bytes";
  EXPECT_NE(one("F32", "[4294967296,4294967296]"), "no error");
  EXPECT_NE(one("F32", "[18446744073709551615]"), "no error");
  EXPECT_NE(one("F32", "[99999999999999999999999999]"), "no error");
}

TEST(Safetensors, HeaderIsAlignedAndReadBack) {
  const Bytes halves(6), doubles(16);
  std::vector<TensorToWrite> tensors = {{"out \"put\"", DType::bfloat16, {3}, halves},
                                        {"lse", DType::float64, {2, 1}, doubles}};
  Bytes file = safetensors_header(tensors);
  EXPECT_EQ(file.size() % 8, 0U);
  for (const TensorToWrite& written : tensors) file.insert(file.end(), written.data.begin(), written.data.end());
  const auto entries = parse_safetensors(file);
  ASSERT_EQ(entries.size(), 2U);
  EXPECT_EQ(entries[0].name, "lse") << "wide elements first";
  EXPECT_EQ(entries[0].dtype, DType::float64);
  EXPECT_EQ(entries[1].name, "out \"put\"");
  EXPECT_EQ(entries[1].shape, Shape{3});
}

}  // namespace
}  // namespace vicus::cli
