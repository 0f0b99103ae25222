// The CPU engine as a whole: its targets. The operators are declared in core/engines.h.
#ifndef VICUS_CPU_ENGINE_H_
#define VICUS_CPU_ENGINE_H_

#include <string>
#include <string_view>
#include <vector>

namespace vicus::cpu {

[[nodiscard]] std::vector<std::string> targets_built();
[[nodiscard]] std::vector<std::string> targets_available();
/// `name` is available, or empty for no limit.
void limit_target(std::string_view name);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_ENGINE_H_
