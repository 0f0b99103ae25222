#include "cli/progress.h"

#include <algorithm>
#include <ostream>

namespace vicus::cli {
namespace {

constexpr int kWidth = 32;
constexpr const char* kErase = "\r\x1b[K";  // to the first column, clear to the end of the line

}  // namespace

Progress::~Progress() {
  if (!drawn_.empty()) out_ << kErase << std::flush;
}

void Progress::update(const std::string& label, double fraction) {
  if (!enabled_) return;
  const double share = std::clamp(fraction, 0.0, 1.0);
  const auto filled = static_cast<std::size_t>(share * kWidth);
  std::string line(1, '[');
  line.append(filled, '#').append(kWidth - filled, '.').append("] ");
  line.append(std::to_string(static_cast<int>(share * 100))).append(" % ").append(label);
  if (line == drawn_) return;
  out_ << kErase << line << std::flush;
  drawn_ = line;
}

}  // namespace vicus::cli
