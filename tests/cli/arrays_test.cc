#include "cli/arrays.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "bytes.h"
#include "cli/format.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

using testing::Bytes;
using testing::MemoryFiles;
using testing::npy;
using testing::raw;
using testing::safetensors;

template <class T>
std::vector<T> values(const Array& array) {
  std::vector<T> result(array.bytes().size() / sizeof(T));
  std::memcpy(result.data(), array.bytes().data(), array.bytes().size());
  return result;
}

TEST(Arrays, AbsentByDefault) { EXPECT_FALSE(Array().view().present()); }

TEST(Arrays, FortranOrderIsTurned) {
  // Element (i, j, k) of a 2 x 3 x 2 array is 100 i + 10 j + k; the first axis is contiguous in the file.
  std::vector<float> file, expected;
  for (int k = 0; k < 2; ++k)
    for (int j = 0; j < 3; ++j)
      for (int i = 0; i < 2; ++i) file.push_back(static_cast<float>(100 * i + 10 * j + k));
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j)
      for (int k = 0; k < 2; ++k) expected.push_back(static_cast<float>(100 * i + 10 * j + k));
  MemoryFiles files;
  files.contents["f.npy"] = npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3, 2)}", raw(file));
  EXPECT_EQ(values<float>(ArrayReader(files, false).read("--query", "f.npy", "query")), expected);
}

TEST(Arrays, UnalignedDataIsMoved) {
  MemoryFiles files;
  for (std::size_t padding = 0; padding < 8; ++padding) {
    std::string header = R"({"x":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}})" + std::string(padding, ' ');
    files.contents["x.safetensors"] = safetensors(header, raw(std::vector<double>{1.5, -2.5}));
    const Array array = ArrayReader(files, false).read("--query", "x.safetensors:x", "query");
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(array.view().data()) % 8, 0U);
    EXPECT_EQ(values<double>(array), (std::vector<double>{1.5, -2.5}));
  }
}

TEST(Arrays, OneFileIsReadOnce) {
  MemoryFiles files;
  files.contents["x.safetensors"] = safetensors(
      R"({"query":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"k":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
      raw(std::vector<float>{1, 2}));
  ArrayReader reader(files, false);
  EXPECT_EQ(values<float>(reader.read("--query", "x.safetensors", "query")), std::vector<float>{1});
  EXPECT_EQ(values<float>(reader.read("--key", "x.safetensors:k", "key")), std::vector<float>{2});
  EXPECT_EQ(files.reads, 1);
  try {
    (void)reader.read("--value", "x.safetensors", "value");
    FAIL() << "no tensor has that name";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "--value is 'value' in 'x.safetensors'; allowed: 'query', 'k'");
  }
}

TEST(Arrays, ErrorsNameTheOption) {
  MemoryFiles files;
  files.contents["bad.npy"] = {};
  files.contents["deep.npy"] = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1)}", Bytes(4));
  files.contents["int.safetensors"] =
      safetensors(R"({"key":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})", Bytes(8));
  ArrayReader reader(files, false);
  const auto message = [&](const std::string& place) -> std::string {
    try {
      (void)reader.read("--key", place, "key");
    } catch (const std::exception& error) {
      return error.what();
    }
    return "no error";
  };
  for (const char* place : {"bad.npy", "deep.npy", "int.safetensors", "missing.npy"}) {
    EXPECT_TRUE(message(place).starts_with("--key")) << message(place);
  }
}

TEST(Arrays, WritesWhatItReads) {
  MemoryFiles files;
  const std::vector<float> numbers = {1, 2, 3, 4, 5, 6};
  const std::vector<std::uint16_t> halves = {0x3f80, 0x4000};
  const std::vector<OutputArray> outputs = {
      {"--output", "o.safetensors", "output", DType::bfloat16, {1, 2}, raw(halves)},
      {"--lse", "o.safetensors:l", "logsumexp", DType::float32, {2, 3}, raw(numbers)},
      {"--more", "m.npy", "more", DType::float32, {6}, raw(numbers)}};
  write_arrays(files, outputs);
  EXPECT_EQ(files.contents.size(), 2U);
  ArrayReader reader(files, false);
  const Array output = reader.read("o", "o.safetensors", "output");
  EXPECT_EQ(output.view().dtype(), DType::bfloat16);
  EXPECT_EQ(values<std::uint16_t>(output), halves);
  EXPECT_EQ(values<float>(reader.read("l", "o.safetensors:l", "")), numbers);
  EXPECT_EQ(values<float>(reader.read("m", "m.npy", "")), numbers);
}

TEST(Arrays, OutputsMustNotCollide) {
  MemoryFiles files;
  const auto refused = [&](const std::string& a, const std::string& b) {
    const std::vector<OutputArray> outputs = {{"--output", a, "output", DType::float32, {0}, {}},
                                              {"--lse", b, "logsumexp", DType::float32, {0}, {}}};
    try {
      check_outputs(files, outputs);
      return false;
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.argument(), "--lse");
      return true;
    }
  };
  EXPECT_FALSE(refused("a.npy", "b.npy"));
  EXPECT_FALSE(refused("a.safetensors", "a.safetensors"));
  EXPECT_TRUE(refused("a.npy", "a.npy"));
  EXPECT_TRUE(refused("a.npy", "./a.npy"));
  EXPECT_TRUE(refused("a.safetensors:x", "a.safetensors:x"));
  EXPECT_TRUE(refused("a.npy", "b.txt"));
  EXPECT_TRUE(refused("a.npy", "b.safetensors:__metadata__"));
  EXPECT_TRUE(refused("a.npy", "b.safetensors:\xff"));
  EXPECT_TRUE(refused("a.npy", "b.safetensors:"));
}

}  // namespace
}  // namespace vicus::cli
