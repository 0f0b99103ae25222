// Any bytes as a safetensors file: an error, or tensors that cover the data once and are written and read back.
#include <cstdint>

#include "bytes.h"
#include "cli/safetensors.h"
#include "require.h"

using vicus::cli::FormatError;
using vicus::cli::SafetensorsEntry;
using vicus::cli::testing::Bytes;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto* first = reinterpret_cast<const std::byte*>(data);
  const Bytes bytes(first, first + size);
  std::vector<SafetensorsEntry> entries;
  try {
    entries = vicus::cli::parse_safetensors(bytes);
  } catch (const FormatError&) {
    return 0;
  }
  std::size_t total = 0;
  std::vector<vicus::cli::TensorToWrite> tensors;
  for (const SafetensorsEntry& entry : entries) {
    require(entry.data.data() >= bytes.data(), "the data begins inside");
    require(entry.data.data() + entry.data.size() <= bytes.data() + bytes.size(), "the data ends inside");
    total += entry.data.size();
    if (!entry.dtype) continue;
    const auto count = vicus::cli::checked_count(entry.shape);
    require(count && *count * vicus::dtype_size(*entry.dtype) == entry.data.size(), "the shape covers the data");
    if (vicus::cli::valid_tensor_name(entry.name))
      tensors.push_back({entry.name, *entry.dtype, entry.shape, entry.data});
  }
  require(total < bytes.size(), "no byte has two owners");

  Bytes again = vicus::cli::safetensors_header(tensors);
  for (const auto& tensor : tensors) again.insert(again.end(), tensor.data.begin(), tensor.data.end());
  require(vicus::cli::parse_safetensors(again).size() == tensors.size(), "what is written is read back");
  return 0;
}
