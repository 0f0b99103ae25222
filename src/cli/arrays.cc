#include "cli/arrays.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <utility>

#include "cli/npy.h"
#include "cli/safetensors.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

constexpr std::string_view kSafetensors = ".safetensors";
constexpr std::string_view kNpy = ".npy";

struct Place {
  std::string path, name;
};

Place split(const std::string& place, const std::string& default_name) {
  const std::string mark = std::string(kSafetensors) + ":";
  const std::size_t at = place.rfind(mark);
  if (at == std::string::npos) return {place, default_name};
  return {place.substr(0, at + kSafetensors.size()), place.substr(at + mark.size())};
}

std::string text_of(std::span<const std::int64_t> shape) {
  std::string text;
  for (const std::int64_t extent : shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "(" + text + ")";
}

/// Elements of a first-axis-contiguous array in last-axis-contiguous order.
std::vector<std::byte> to_row_major(const FileArray& array) {
  const std::size_t size = dtype_size(array.dtype);
  std::vector<std::byte> data(array.data.size());
  std::vector<std::int64_t> index(array.shape.size(), 0);
  std::vector<std::size_t> step(array.shape.size(), size);
  for (std::size_t axis = 1; axis < step.size(); ++axis) {
    step[axis] = step[axis - 1] * static_cast<std::size_t>(array.shape[axis - 1]);
  }
  std::size_t from = 0;
  for (std::size_t to = 0; to < data.size(); to += size) {
    std::memcpy(data.data() + to, array.data.data() + from, size);
    for (std::size_t axis = index.size(); axis-- > 0;) {
      from += step[axis];
      if (++index[axis] < array.shape[axis]) break;
      from -= step[axis] * static_cast<std::size_t>(array.shape[axis]);
      index[axis] = 0;
    }
  }
  return data;
}

/// The array as operators want it: in place where it can be, otherwise moved to memory of its own.
Array adopt(const std::shared_ptr<const std::vector<std::byte>>& contents, const FileArray& array) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(array.data.data()) % dtype_size(array.dtype) == 0;
  if (aligned && !array.fortran_order) return {contents, array.data, array.dtype, array.shape};
  auto own = std::make_shared<const std::vector<std::byte>>(
      array.fortran_order ? to_row_major(array) : std::vector<std::byte>(array.data.begin(), array.data.end()));
  const std::span<const std::byte> data = *own;
  return {std::move(own), data, array.dtype, array.shape};
}

FileArray pick(std::span<const std::byte> bytes, const std::string& argument, const Place& place) {
  std::string names;
  for (SafetensorsEntry& entry : parse_safetensors(bytes)) {
    if (entry.name == place.name) {
      if (entry.dtype) return {*entry.dtype, std::move(entry.shape), false, entry.data};
      throw FormatError("holds '" + entry.name + "' as " + entry.type + "; F32, F64, F16 or BF16 is needed");
    }
    if (names.size() < 200) names += (names.empty() ? "'" : ", '") + entry.name + "'";
  }
  throw InvalidArgument(argument, "'" + place.name + "' in '" + place.path + "'",
                        names.empty() ? "nothing, the file holds no tensor" : names);
}

std::string extension_of(const Place& place) { return std::filesystem::path(place.path).extension().string(); }

bool same_file(const Place& a, const Place& b) {
  return std::filesystem::path(a.path).lexically_normal() == std::filesystem::path(b.path).lexically_normal();
}

}  // namespace

ConstTensorView Array::view() const {
  if (!storage_) return {};
  return {data_.data(), dtype_, TensorLayout(shape_)};
}

ArrayReader::Bytes ArrayReader::contents(const std::string& argument, const std::string& path) {
  Bytes& bytes = contents_[path];
  if (!bytes) bytes = std::make_shared<const std::vector<std::byte>>(files_.read(argument, path));
  return bytes;
}

Array ArrayReader::read(const std::string& argument, const std::string& place_text, const std::string& name) {
  const Place place = split(place_text, name);
  const Bytes bytes = contents(argument, place.path);
  try {
    const FileArray array = is_npy(*bytes) || extension_of(place) == kNpy ? parse_npy(*bytes, void_is_bfloat16_)
                                                                          : pick(*bytes, argument, place);
    if (array.shape.size() > static_cast<std::size_t>(kMaxDims)) {
      throw InvalidArgument(argument, "an array of shape " + text_of(array.shape), "at most 6 dimensions");
    }
    return adopt(bytes, array);
  } catch (const FormatError& error) {
    throw FormatError(argument + ": '" + place.path + "' " + error.what());
  }
}

void check_outputs(Files& files, std::span<const OutputArray> outputs) {
  for (const OutputArray& output : outputs) {
    const Place place = split(output.place, output.name);
    const std::string extension = extension_of(place);
    if (extension != kNpy && extension != kSafetensors) {
      throw InvalidArgument(output.argument, "'" + output.place + "'", "a file name that ends in .npy or .safetensors");
    }
    if (!valid_tensor_name(place.name)) {
      throw InvalidArgument(output.argument, "'" + output.place + "'", "a tensor name of UTF-8 text, not __metadata__");
    }
    for (const OutputArray& other : outputs) {
      const Place its = split(other.place, other.name);
      if (&other < &output && same_file(place, its) && (extension == kNpy || place.name == its.name)) {
        throw InvalidArgument(
            output.argument, "'" + output.place + "'",
            "another place than that of " + other.argument + ", or another name in a .safetensors file");
      }
    }
    files.check_output(output.argument, place.path);
  }
}

void write_arrays(Files& files, std::span<const OutputArray> outputs) {
  check_outputs(files, outputs);
  std::vector<OutputBytes> result;
  std::vector<std::vector<std::byte>> headers;
  headers.reserve(outputs.size());
  std::vector<bool> done(outputs.size(), false);
  for (std::size_t first = 0; first < outputs.size(); ++first) {
    if (done[first]) continue;
    const Place place = split(outputs[first].place, outputs[first].name);
    OutputBytes file{outputs[first].argument, place.path, {}};
    std::vector<TensorToWrite> tensors;
    for (std::size_t i = first; i < outputs.size(); ++i) {
      const Place its = split(outputs[i].place, outputs[i].name);
      if (done[i] || !same_file(place, its)) continue;
      done[i] = true;
      tensors.push_back({its.name, outputs[i].dtype, outputs[i].shape, outputs[i].data});
    }
    headers.push_back(extension_of(place) == kNpy ? npy_header(tensors.front().dtype, tensors.front().shape)
                                                  : safetensors_header(tensors));
    file.pieces.emplace_back(headers.back());
    for (const TensorToWrite& tensor : tensors) file.pieces.push_back(tensor.data);
    result.push_back(std::move(file));
  }
  files.write(result);
}

}  // namespace vicus::cli
