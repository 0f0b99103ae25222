// The kinds of file that `vicus denoise` reads and writes. A function reads one kind, filters, and writes the same.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include "cli/arrays.h"
#include "cli/audio.h"
#include "cli/denoise_filter.h"
#include "cli/image.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<std::byte>;

constexpr const char* kInput = "input";
constexpr const char* kOutput = "--output";

/// Adds the seconds of its life to `sum`.
class Stopwatch {
 public:
  explicit Stopwatch(double& sum) : sum_(sum) {}
  ~Stopwatch() { sum_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch(Stopwatch&&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  Stopwatch& operator=(Stopwatch&&) = delete;

 private:
  double& sum_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::string extension_of(const std::string& path) {
  std::string extension = fs::path(path).extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return extension;
}

bool is_table(const std::string& path) {
  const std::string extension = extension_of(path);
  return extension == ".csv" || extension == ".tsv" || extension == ".txt";
}

bool is_array(const std::string& path) {
  return extension_of(path) == ".npy" || path.ends_with(".safetensors") ||
         path.find(".safetensors:") != std::string::npos;
}

/// Outputs are of the kind of the input, and a name that says otherwise would lie.
void check_extension(const std::string& output, const std::string& expected) {
  if (extension_of(output) != expected) {
    throw InvalidArgument(kOutput, "'" + output + "'", "a name ending in " + expected + ", the kind of the input");
  }
}

/// --columns and --channels-last speak of one kind of file each.
void check_options(const DenoiseRequest& request, bool table, bool array) {
  if (!table && !request.columns.empty()) {
    throw InvalidArgument("--columns", "'" + request.columns.front() + "'", "only with .csv, .tsv or .txt input");
  }
  if (!array && request.channels_last) {
    throw InvalidArgument("--channels-last", "given", "only with .npy or .safetensors input");
  }
}

/// One file for each picture: --output itself, or the pictures' names in the directory --output.
std::vector<std::string> picture_outputs(const DenoiseRequest& request, Files& files) {
  std::vector<std::string> outputs;
  if (request.inputs.size() == 1) {
    outputs.push_back(request.output);
  } else {
    if (!fs::is_directory(request.output)) {
      throw InvalidArgument(kOutput, "'" + request.output + "'", "an existing directory, for several pictures");
    }
    for (const std::string& input : request.inputs) {
      outputs.push_back((fs::path(request.output) / fs::path(input).filename()).string());
    }
    if (std::set<std::string>(outputs.begin(), outputs.end()).size() != outputs.size()) {
      throw InvalidArgument(kInput, "several files of one name",
                            "pictures whose names differ without their directories");
    }
  }
  for (const std::string& output : outputs) {
    check_extension(output, ".png");
    files.check_output(kOutput, output);
  }
  return outputs;
}

std::string describe(const Image& image) {
  return std::to_string(image.width) + "x" + std::to_string(image.height) + ", " + std::to_string(image.bits) +
         " bits, " + std::to_string(image.samples_per_pixel()) + " samples per pixel";
}

/// Copies the colours between pictures, which may hold alpha beside them, and one list of all their colours.
template <class Copy>
void for_each_colour(std::vector<Image>& frames, const Copy& copy) {
  std::size_t to = 0;
  for (Image& image : frames) {
    const auto step = static_cast<std::size_t>(image.samples_per_pixel());
    for (std::size_t pixel = 0; pixel < image.samples.size(); pixel += step) {
      for (int c = 0; c < image.colours; ++c) copy(image.samples[pixel + static_cast<std::size_t>(c)], to++);
    }
  }
}

void denoise_pictures(const DenoiseRequest& request, Context& context, DenoiseFilter& filter, const Bytes& first) {
  check_options(request, false, false);
  const std::vector<std::string> outputs = picture_outputs(request, context.files);
  std::vector<Image> frames;
  Samples samples;
  {
    const Stopwatch watch(filter.read_seconds);
    for (const std::string& input : request.inputs) {
      const bool read = frames.empty();  // to tell what kind of file it is
      frames.push_back(decode_png(kInput, input, read ? first : context.files.read(kInput, input)));
      if (describe(frames.back()) != describe(frames.front())) {
        throw InvalidArgument(kInput, "'" + input + "' (" + describe(frames.back()) + ")",
                              "frames like the first: " + describe(frames.front()));
      }
    }
    const Image& image = frames.front();
    const auto count = static_cast<std::int64_t>(frames.size());
    const Extent extent{count, image.height, image.width};
    std::vector<std::uint16_t> colours(static_cast<std::size_t>(volume(extent) * image.colours));
    for_each_colour(frames, [&](std::uint16_t& sample, std::size_t i) { colours[i] = sample; });
    samples = Samples::of(count == 1 ? 2 : 3, extent, image.colours, colours.data());
  }
  const double largest = frames.front().largest();
  const Samples result = filter(samples, largest / 255);
  const Stopwatch watch(filter.write_seconds);
  for_each_colour(frames, [&](std::uint16_t& sample, std::size_t i) {
    sample = static_cast<std::uint16_t>(std::lround(std::clamp(result.value(i), 0.0, largest)));
  });
  std::vector<Bytes> encoded;
  encoded.reserve(frames.size());
  for (const Image& image : frames) encoded.push_back(encode_png(image));
  std::vector<OutputBytes> files;
  files.reserve(frames.size());
  for (std::size_t i = 0; i < encoded.size(); ++i) files.push_back({kOutput, outputs[i], {encoded[i]}});
  context.files.write(files);
}

/// All values of `samples`, channels last.
std::vector<double> values_of(const Samples& samples) {
  std::vector<double> values(samples.deviation.size());
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = samples.value(i);
  return values;
}

void write_one(const DenoiseRequest& request, Context& context, const Bytes& bytes) {
  const OutputBytes file{kOutput, request.output, {bytes}};
  context.files.write({&file, 1});
}

Extent signal_extent(std::size_t length) { return {1, 1, static_cast<std::int64_t>(length)}; }

void denoise_table(const DenoiseRequest& request, Context& context, DenoiseFilter& filter, const Bytes& file) {
  check_options(request, true, false);
  context.files.check_output(kOutput, request.output);
  Table table(kInput, request.inputs.front(), file);
  std::vector<std::size_t> columns;
  columns.reserve(request.columns.size() + 1);
  for (const std::string& name : request.columns) columns.push_back(table.column("--columns", name));
  if (columns.empty()) columns.push_back(table.columns() - 1);
  for (const std::size_t column : columns) {
    const std::vector<double> numbers = table.numbers(column);
    const Samples samples = Samples::of(1, signal_extent(numbers.size()), 1, numbers.data());
    table.set_numbers(column, values_of(filter(samples, 1)));
  }
  const Stopwatch watch(filter.write_seconds);
  write_one(request, context, table.text());
}

void denoise_sound(const DenoiseRequest& request, Context& context, DenoiseFilter& filter, const Bytes& file) {
  Sound sound;
  {
    const Stopwatch watch(filter.read_seconds);
    sound = decode_sound(kInput, request.inputs.front(), file);
  }
  check_options(request, false, false);
  check_extension(request.output, extension_of(request.inputs.front()));
  context.files.check_output(kOutput, request.output);
  const std::size_t frames = sound.samples.size() / static_cast<std::size_t>(sound.channels);
  const Samples samples = Samples::of(1, signal_extent(frames), sound.channels, sound.samples.data());
  sound.samples = values_of(filter(samples, 1));
  const Stopwatch watch(filter.write_seconds);
  write_one(request, context, encode_sound(sound));
}

void denoise_array(const DenoiseRequest& request, Context& context, DenoiseFilter& filter) {
  check_options(request, false, true);
  OutputArray output{kOutput, request.output, "array", DType::float32, {}, {}};
  check_outputs(context.files, {&output, 1});
  Samples samples;
  {
    const Stopwatch watch(filter.read_seconds);
    const Array array = ArrayReader(context.files, false).read(kInput, request.inputs.front(), "array");
    const ConstTensorView view = array.view();
    output.dtype = view.dtype();
    output.shape.assign(view.shape().begin(), view.shape().end());
    const int rank = view.dims() - (request.channels_last ? 1 : 0);
    const std::string got =
        "an array of " + std::to_string(view.dims()) + " axes of " + std::string(dtype_name(output.dtype));
    if (rank < 1 || rank > 3 || (output.dtype != DType::float32 && output.dtype != DType::float64)) {
      throw InvalidArgument(kInput, got, "1 to 3 axes, and one more with --channels-last, of float32 or float64");
    }
    constexpr std::int64_t kMostChannels = 256;
    const std::int64_t channels = request.channels_last ? view.shape().back() : 1;
    if (channels < 1 || channels > kMostChannels) {
      throw InvalidArgument(kInput, std::to_string(channels) + " channels", "1 to 256 on the last axis");
    }
    Extent extent{1, 1, 1};
    std::copy_n(view.shape().begin(), rank, extent.end() - rank);
    samples = output.dtype == DType::float32
                  ? Samples::of(rank, extent, static_cast<int>(channels), static_cast<const float*>(view.data()))
                  : Samples::of(rank, extent, static_cast<int>(channels), static_cast<const double*>(view.data()));
  }
  const std::vector<double> values = values_of(filter(samples, 1));
  const Stopwatch watch(filter.write_seconds);
  output.data.resize(values.size() * dtype_size(output.dtype));
  if (output.dtype == DType::float64) {
    std::memcpy(output.data.data(), values.data(), output.data.size());
  } else {
    const std::vector<float> narrow(values.begin(), values.end());
    std::memcpy(output.data.data(), narrow.data(), output.data.size());
  }
  write_arrays(context.files, {&output, 1});
}

}  // namespace

void denoise_files(const DenoiseRequest& request, Context& context, DenoiseFilter& filter) {
  const std::string& first = request.inputs.front();
  const bool array = is_array(first);
  Bytes file;
  if (!array) {
    const Stopwatch watch(filter.read_seconds);
    file = context.files.read(kInput, first);
  }
  if (!array && is_png(file)) return denoise_pictures(request, context, filter, file);
  if (request.inputs.size() > 1) {
    throw InvalidArgument(kInput, std::to_string(request.inputs.size()) + " files, '" + first + "' first",
                          "several files only when all are PNG pictures");
  }
  if (array) return denoise_array(request, context, filter);
  if (is_table(first)) return denoise_table(request, context, filter, file);
  denoise_sound(request, context, filter, file);
}

}  // namespace vicus::cli
