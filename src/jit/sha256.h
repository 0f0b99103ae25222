// SHA-256 (FIPS 180-4): names cache entries by what they were made from, and tells a damaged one.
#ifndef VICUS_JIT_SHA256_H_
#define VICUS_JIT_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace vicus::jit {

class Sha256 {
 public:
  using Digest = std::array<std::uint8_t, 32>;

  void add(std::string_view bytes);
  /// The length first, so that texts added one after another cannot run into each other.
  void add_sized(std::string_view bytes);
  /// Ends the message; nothing may be added afterwards.
  [[nodiscard]] Digest finish();

 private:
  static constexpr std::size_t kBlock = 64;
  void add_block(const std::uint8_t* block);

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, kBlock> rest_{};
  std::uint64_t bytes_ = 0;
};

[[nodiscard]] std::string hex(const Sha256::Digest& digest);

}  // namespace vicus::jit

#endif  // VICUS_JIT_SHA256_H_
