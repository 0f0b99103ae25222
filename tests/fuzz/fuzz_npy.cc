// Any bytes as a .npy file: an error, or an array inside the bytes that is written and read back as it was.
#include <cstdint>

#include "bytes.h"
#include "cli/arrays.h"
#include "cli/npy.h"
#include "require.h"
#include "vicus/error.h"

using vicus::cli::ArrayReader;
using vicus::cli::FileArray;
using vicus::cli::FormatError;
using vicus::cli::testing::Bytes;
using vicus::cli::testing::join;
using vicus::cli::testing::MemoryFiles;

namespace {

void check(const Bytes& bytes, bool void_is_bfloat16) {
  FileArray array;
  try {
    array = vicus::cli::parse_npy(bytes, void_is_bfloat16);
  } catch (const FormatError&) {
    return;
  }
  const auto count = vicus::cli::checked_count(array.shape);
  require(count && *count * vicus::dtype_size(array.dtype) == array.data.size(), "the shape covers the data");
  require(array.data.data() >= bytes.data(), "the data begins inside");
  require(array.data.data() + array.data.size() == bytes.data() + bytes.size(), "the data ends where the file ends");

  const Bytes again = join(vicus::cli::npy_header(array.dtype, array.shape), array.data);
  const FileArray copy = vicus::cli::parse_npy(again, true);
  require(copy.dtype == array.dtype && copy.shape == array.shape && copy.data.size() == array.data.size(),
          "what is written is read back");

  MemoryFiles files;
  files.contents["x.npy"] = bytes;
  try {
    const vicus::cli::Array read = ArrayReader(files, void_is_bfloat16).read("--query", "x.npy", "query");
    require(read.bytes().size() == array.data.size(), "the reader keeps every byte");
  } catch (const vicus::InvalidArgument&) {
    require(array.shape.size() > 6, "six dimensions are accepted");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto* first = reinterpret_cast<const std::byte*>(data);
  const Bytes bytes(first, first + size);
  check(bytes, false);
  check(bytes, true);
  return 0;
}
