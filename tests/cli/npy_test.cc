#include "cli/npy.h"

#include <gtest/gtest.h>

#include "bytes.h"

namespace vicus::cli {
namespace {

using testing::Bytes;
using testing::join;
using testing::little_endian;
using testing::npy;
using testing::to_bytes;
using Shape = std::vector<std::int64_t>;

std::string error_of(const Bytes& bytes, bool void_is_bfloat16 = false) {
  try {
    (void)parse_npy(bytes, void_is_bfloat16);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Npy, ReadsEveryDtype) {
  struct Case {
    const char* descr;
    DType dtype;
    std::size_t size;
  };
  for (const Case& c : {Case{"<f4", DType::float32, 4}, Case{"<f8", DType::float64, 8}, Case{"<f2", DType::float16, 2},
                        Case{"<V2", DType::bfloat16, 2}, Case{"|V2", DType::bfloat16, 2}}) {
    const Bytes file = npy("{'descr': '" + std::string(c.descr) + "', 'fortran_order': False, 'shape': (2, 3), }\n",
                           Bytes(6 * c.size));
    const FileArray array = parse_npy(file, true);
    EXPECT_EQ(array.dtype, c.dtype) << c.descr;
    EXPECT_EQ(array.shape, (Shape{2, 3}));
    EXPECT_FALSE(array.fortran_order);
    EXPECT_EQ(array.data.size(), 6 * c.size);
    EXPECT_EQ(array.data.data() + array.data.size(), file.data() + file.size());
  }
}

TEST(Npy, ReadsWhatPythonMayWrite) {
  // Order of keys, quotes, spaces and trailing commas are free in a Python literal.
  EXPECT_TRUE(
      parse_npy(npy("{\"shape\":(4,),\"fortran_order\":True,\"descr\":\"<f4\"}", Bytes(16)), false).fortran_order);
  EXPECT_EQ(parse_npy(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (), }   \n", Bytes(4)), false).shape,
            Shape{});
  EXPECT_EQ(parse_npy(npy("{'descr':'<f4','fortran_order':False,'shape':( 2 , 0 ,)}", {}), false).shape, (Shape{2, 0}));
}

TEST(Npy, ReadsVersionsWithLongHeaders) {
  const std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }";
  for (const char version : {'\x02', '\x03'}) {
    const Bytes file = join(to_bytes("\x93NUMPY"), to_bytes(std::string(1, version)), Bytes(1),
                            little_endian(text.size(), 4), to_bytes(text), Bytes(4));
    EXPECT_EQ(parse_npy(file, false).shape, Shape{1});
  }
}

TEST(Npy, EveryTruncationIsAnError) {
  const Bytes file = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", Bytes(24));
  for (std::size_t size = 0; size < file.size(); ++size) {
    const Bytes cut(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_NE(error_of(cut), "no error") << size;
  }
  EXPECT_EQ(error_of(file), "no error");
  EXPECT_NE(error_of(join(file, Bytes(1))), "no error") << "bytes after the array";
}

TEST(Npy, MalformedHeadersAreErrors) {
  const char* const headers[] = {
      "",
      "{}",
      "{'descr': '<f4', 'fortran_order': False}",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (1)}",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (1 1,)}",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (,)}",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (1.0,)}",
      "{'descr': '<f4', 'fortran_order': False, 'shape': [1]}",
      "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
      "{'descr': '<f4', 'fortran_order': False 'shape': (1,)}",
      "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
      "{'descr': '<f4, 'fortran_order': False, 'shape': (1,)}",
      "{'descr': <f4, 'fortran_order': False, 'shape': (1,)}",
  };
  for (const char* header : headers) EXPECT_NE(error_of(npy(header, Bytes(4))), "no error") << header;
  Bytes zero = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}#", Bytes(4));
  zero[zero.size() - 5] = std::byte{0};
  EXPECT_NE(error_of(zero), "no error") << "a zero byte in the header";
}

TEST(Npy, ShapesThatOverflowAreErrors) {
  for (const char* shape :
       {"(9223372036854775808,)", "(4611686018427387904, 4)", "(4294967296, 4294967296)", "(9223372036854775807, 3)",
        "(0, 9223372036854775807, 9223372036854775807)", "(4611686018427387904,)", "(99999999999999999999999,)"}) {
    const std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': " + std::string(shape) + "}";
    EXPECT_NE(error_of(npy(header)).find("63 bits"), std::string::npos) << shape;
  }
  const std::string huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}";
  EXPECT_NE(error_of(npy(huge, Bytes(4))).find("needs 4000000000000"), std::string::npos);
}

TEST(Npy, OtherTypesAreNamed) {
  const auto typed = [](const std::string& descr) {
    return error_of(npy("{'descr': " + descr + ", 'fortran_order': False, 'shape': (1,)}", Bytes(8)));
  };
  EXPECT_NE(typed("'>f4'").find("big-endian"), std::string::npos);
  EXPECT_NE(typed("'<i8'").find("'<i8'"), std::string::npos);
  EXPECT_NE(typed("'|O'").find("'|O'"), std::string::npos);
  EXPECT_NE(typed("'<V2'").find("--dtype bfloat16"), std::string::npos);
  EXPECT_NE(typed("[('a', '<f4')]").find("fields"), std::string::npos);
}

TEST(Npy, HeaderIsAlignedAndReadBack) {
  for (const DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    for (const Shape& shape : {Shape{}, Shape{5}, Shape{2, 3}, Shape{1, 0, 123456789, 1, 2, 3}}) {
      std::size_t count = 1;
      for (const std::int64_t extent : shape) count *= static_cast<std::size_t>(extent);
      const Bytes header = npy_header(dtype, shape);
      EXPECT_EQ(header.size() % 64, 0U);
      EXPECT_EQ(header.back(), std::byte{'\n'});
      const Bytes file = join(header, Bytes(count * dtype_size(dtype)));
      const FileArray array = parse_npy(file, true);
      EXPECT_EQ(array.dtype, dtype);
      EXPECT_EQ(array.shape, shape);
    }
  }
}

}  // namespace
}  // namespace vicus::cli
