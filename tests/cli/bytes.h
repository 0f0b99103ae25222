// Files made by hand, byte by byte, and files that live in memory.
#ifndef VICUS_TESTS_CLI_BYTES_H_
#define VICUS_TESTS_CLI_BYTES_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cli/files.h"

namespace vicus::cli::testing {

using Bytes = std::vector<std::byte>;

inline Bytes to_bytes(std::string_view text) {
  Bytes bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

template <class... More>
Bytes join(Bytes first, const More&... more) {
  (first.insert(first.end(), more.begin(), more.end()), ...);
  return first;
}

template <class T>
Bytes raw(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

inline Bytes little_endian(std::uint64_t value, std::size_t size) {
  Bytes bytes;
  for (std::size_t i = 0; i < size; ++i) bytes.push_back(static_cast<std::byte>(value >> (8 * i)));
  return bytes;
}

/// A .npy file of version 1 with this dictionary.
inline Bytes npy(const std::string& dictionary, const Bytes& data = {}) {
  return join(to_bytes("\x93NUMPY\x01"), Bytes(1), little_endian(dictionary.size(), 2), to_bytes(dictionary), data);
}

/// A safetensors file with this header.
inline Bytes safetensors(const std::string& header, const Bytes& data = {}) {
  return join(little_endian(header.size(), 8), to_bytes(header), data);
}

class MemoryFiles : public Files {
 public:
  std::map<std::string, Bytes> contents;
  int reads = 0;

  Bytes read(const std::string& argument, const std::string& path) override {
    ++reads;
    const auto found = contents.find(path);
    if (found == contents.end()) throw IoError(argument + ": cannot open '" + path + "'");
    return found->second;
  }
  void check_output(const std::string&, const std::string&) override {}
  void write(std::span<const OutputBytes> outputs) override {
    for (const OutputBytes& output : outputs) {
      Bytes& bytes = contents[output.path];
      bytes.clear();
      for (const auto piece : output.pieces) bytes.insert(bytes.end(), piece.begin(), piece.end());
    }
  }
};

}  // namespace vicus::cli::testing

#endif  // VICUS_TESTS_CLI_BYTES_H_
