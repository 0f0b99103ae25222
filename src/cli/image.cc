#include "cli/image.h"

#include <png.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "vicus/error.h"

// libpng reports errors by longjmp. Functions that call setjmp below hold no object with a destructor, and what they
// change lives in a struct of their caller.
namespace vicus::cli {
namespace {

/// Pixels a picture may have: 2^28 hold 1.5 GiB of colour samples, and a damaged header must not ask for more.
constexpr std::uint64_t kMostPixels = std::uint64_t{1} << 28;

void remember_error(png_structp png, png_const_charp message) {
  auto* text = static_cast<std::string*>(png_get_error_ptr(png));
  text->assign(message);
  png_longjmp(png, 1);
}

void ignore_warning(png_structp /*png*/, png_const_charp /*message*/) {}

struct Reader {
  std::span<const std::byte> file;
  std::size_t position = 0;
  std::string error;
  png_structp png = nullptr;
  png_infop info = nullptr;
  Image image;
  std::vector<std::uint8_t> bytes;
  std::vector<png_bytep> rows;
};

struct DestroyReader {
  void operator()(Reader* r) const { png_destroy_read_struct(&r->png, &r->info, nullptr); }
};

void read_bytes(png_structp png, png_bytep to, std::size_t count) {
  auto* reader = static_cast<Reader*>(png_get_io_ptr(png));
  if (count > reader->file.size() - reader->position) png_error(png, "the file ends early");
  std::memcpy(to, reader->file.data() + reader->position, count);
  reader->position += count;
}

void keep_display(Reader& r) {
  Image::Display& d = r.image.display;
  png_get_gAMA(r.png, r.info, &d.gamma);
  png_get_sRGB(r.png, r.info, &d.srgb_intent);
  png_charp name = nullptr;
  png_bytep profile = nullptr;
  png_uint_32 length = 0;
  int compression = 0;
  if (png_get_iCCP(r.png, r.info, &name, &compression, &profile, &length) != 0) {
    d.profile_name = name;
    d.profile.assign(profile, profile + length);
  }
  png_get_pHYs(r.png, r.info, &d.dots_x, &d.dots_y, &d.dots_unit);
}

bool read_header(Reader& r) {
  if (setjmp(png_jmpbuf(r.png)) != 0) return false;  // NOLINT(cert-err52-cpp)
  png_set_read_fn(r.png, &r, read_bytes);
  png_read_info(r.png, r.info);
  r.image.width = static_cast<int>(png_get_image_width(r.png, r.info));
  r.image.height = static_cast<int>(png_get_image_height(r.png, r.info));
  png_set_expand(r.png);
  if (std::endian::native == std::endian::little) png_set_swap(r.png);
  png_set_interlace_handling(r.png);
  png_read_update_info(r.png, r.info);
  const int type = png_get_color_type(r.png, r.info);
  r.image.colours = (type & PNG_COLOR_MASK_COLOR) != 0 ? 3 : 1;
  r.image.alpha = (type & PNG_COLOR_MASK_ALPHA) != 0;
  r.image.bits = png_get_bit_depth(r.png, r.info);
  keep_display(r);
  return true;
}

bool read_rows(Reader& r) {
  if (setjmp(png_jmpbuf(r.png)) != 0) return false;  // NOLINT(cert-err52-cpp)
  png_read_image(r.png, r.rows.data());
  png_read_end(r.png, nullptr);
  return true;
}

struct Writer {
  std::vector<std::byte> file;
  std::string error;
  png_structp png = nullptr;
  png_infop info = nullptr;
  std::vector<std::uint8_t> bytes;
  std::vector<png_bytep> rows;
};

struct DestroyWriter {
  void operator()(Writer* w) const { png_destroy_write_struct(&w->png, &w->info); }
};

void write_bytes(png_structp png, png_bytep from, std::size_t count) {
  auto* writer = static_cast<Writer*>(png_get_io_ptr(png));
  const auto* first = reinterpret_cast<const std::byte*>(from);
  writer->file.insert(writer->file.end(), first, first + count);
}

void flush_nothing(png_structp /*png*/) {}

bool write_all(Writer& w, const Image& image) {
  if (setjmp(png_jmpbuf(w.png)) != 0) return false;  // NOLINT(cert-err52-cpp)
  png_set_write_fn(w.png, &w, write_bytes, flush_nothing);
  const int type = (image.colours == 3 ? PNG_COLOR_MASK_COLOR : 0) | (image.alpha ? PNG_COLOR_MASK_ALPHA : 0);
  png_set_IHDR(w.png, w.info, static_cast<png_uint_32>(image.width), static_cast<png_uint_32>(image.height), image.bits,
               type, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  const Image::Display& d = image.display;
  if (!d.profile.empty()) {
    png_set_iCCP(w.png, w.info, d.profile_name.c_str(), PNG_COMPRESSION_TYPE_BASE, d.profile.data(),
                 static_cast<png_uint_32>(d.profile.size()));
  } else if (d.srgb_intent >= 0) {
    png_set_sRGB(w.png, w.info, d.srgb_intent);
  }
  if (d.gamma > 0) png_set_gAMA(w.png, w.info, d.gamma);
  if (d.dots_x > 0) png_set_pHYs(w.png, w.info, d.dots_x, d.dots_y, d.dots_unit);
  png_write_info(w.png, w.info);
  if (std::endian::native == std::endian::little) png_set_swap(w.png);
  png_write_image(w.png, w.rows.data());
  png_write_end(w.png, nullptr);
  return true;
}

/// Points `rows` at the lines of `bytes`, which is resized to hold the picture.
template <class Stream>
void lay_out(Stream& stream, const Image& image) {
  const std::size_t line =
      static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.samples_per_pixel() * image.bits / 8);
  stream.bytes.resize(line * static_cast<std::size_t>(image.height));
  for (int y = 0; y < image.height; ++y)
    stream.rows.push_back(stream.bytes.data() + line * static_cast<std::size_t>(y));
}

}  // namespace

bool is_png(std::span<const std::byte> file) noexcept {
  constexpr std::size_t kSignature = 8;
  return file.size() >= kSignature && png_sig_cmp(reinterpret_cast<png_const_bytep>(file.data()), 0, kSignature) == 0;
}

Image decode_png(const std::string& argument, const std::string& path, std::span<const std::byte> file) {
  Reader r;
  const std::unique_ptr<Reader, DestroyReader> cleanup(&r);
  r.file = file;
  r.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &r.error, remember_error, ignore_warning);
  if (r.png != nullptr) r.info = png_create_info_struct(r.png);
  if (r.info == nullptr) throw std::bad_alloc();
  const auto refuse = [&](const std::string& why) {
    throw InvalidArgument(argument, "'" + path + "' (" + why + ")", "a PNG picture");
  };
  if (!read_header(r)) refuse(r.error);
  Image& image = r.image;
  if (static_cast<std::uint64_t>(image.width) * static_cast<std::uint64_t>(image.height) > kMostPixels) {
    refuse(std::to_string(image.width) + "x" + std::to_string(image.height) + " pixels, more than 2^28");
  }
  lay_out(r, image);
  if (!read_rows(r)) refuse(r.error);
  if (image.bits == 16) {
    image.samples.resize(r.bytes.size() / 2);
    std::memcpy(image.samples.data(), r.bytes.data(), r.bytes.size());
  } else {
    image.samples.assign(r.bytes.begin(), r.bytes.end());
  }
  return std::move(image);
}

std::vector<std::byte> encode_png(const Image& image) {
  Writer w;
  const std::unique_ptr<Writer, DestroyWriter> cleanup(&w);
  w.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &w.error, remember_error, ignore_warning);
  if (w.png != nullptr) w.info = png_create_info_struct(w.png);
  if (w.info == nullptr) throw std::bad_alloc();
  lay_out(w, image);
  if (image.bits == 16) {
    std::memcpy(w.bytes.data(), image.samples.data(), w.bytes.size());
  } else {
    std::transform(image.samples.begin(), image.samples.end(), w.bytes.begin(),
                   [](std::uint16_t sample) { return static_cast<std::uint8_t>(sample); });
  }
  if (!write_all(w, image)) throw std::runtime_error("PNG: " + w.error);
  return std::move(w.file);
}

}  // namespace vicus::cli
