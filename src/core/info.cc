#include "vicus/info.h"

#include "cpu/engine.h"
#include "cpu/threads.h"
#include "vicus/error.h"

namespace vicus {

std::string_view version() noexcept { return VICUS_VERSION; }

std::vector<std::string> cpu_targets_built() { return cpu::targets_built(); }

std::vector<std::string> cpu_targets_available() { return cpu::targets_available(); }

void limit_cpu_target(std::string_view name) {
  std::string allowed;
  for (const std::string& target : cpu::targets_available()) {
    if (target == name) return cpu::limit_target(name);
    allowed += (allowed.empty() ? "" : ", ") + target;
  }
  if (name.empty()) return cpu::limit_target(name);
  throw InvalidArgument("cpu target", "'" + std::string(name) + "'", allowed);
}

int default_threads() noexcept { return cpu::max_threads(); }

}  // namespace vicus
