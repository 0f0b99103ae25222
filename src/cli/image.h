// PNG pictures in memory, through libpng: grey or colour, 8 or 16 bits, with or without alpha.
#ifndef VICUS_CLI_IMAGE_H_
#define VICUS_CLI_IMAGE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace vicus::cli {

/// Palettes are expanded to colours, fewer than 8 bits to 8, a transparent colour to an alpha channel.
struct Image {
  int width = 0, height = 0;
  int colours = 1;                     ///< 1 grey, 3 red green blue
  bool alpha = false;                  ///< one more sample per pixel, the last
  int bits = 8;                        ///< 8 or 16
  std::vector<std::uint16_t> samples;  ///< [height, width, colours + alpha], 0 .. 2^bits - 1

  /// What says how to show the samples, kept from the file that was read.
  struct Display {
    double gamma = 0;          ///< 0: none
    int srgb_intent = -1;      ///< -1: none
    std::string profile_name;  ///< ICC profile
    std::vector<unsigned char> profile;
    std::uint32_t dots_x = 0, dots_y = 0;  ///< pixels per `dots_unit`; 0: none
    int dots_unit = 0;
  } display;

  [[nodiscard]] int samples_per_pixel() const noexcept { return colours + (alpha ? 1 : 0); }
  [[nodiscard]] int largest() const noexcept { return (1 << bits) - 1; }
};

/// Whether `file` begins as a PNG does.
[[nodiscard]] bool is_png(std::span<const std::byte> file) noexcept;

/// Throws InvalidArgument naming `argument` and `path` when the file is not a whole, correct PNG.
[[nodiscard]] Image decode_png(const std::string& argument, const std::string& path, std::span<const std::byte> file);

/// The file of a picture: not interlaced, compressed.
[[nodiscard]] std::vector<std::byte> encode_png(const Image& image);

}  // namespace vicus::cli

#endif  // VICUS_CLI_IMAGE_H_
