// The GPUs that plans are made for where none is at hand.
#include <algorithm>
#include <array>
#include <string>

#include "jit/device.h"
#include "vicus/compile.h"
#include "vicus/error.h"

namespace vicus {
namespace {

constexpr int kKiB = 1024;
/// Shared memory that a block may ask for: that of a multiprocessor less 1 KiB.
constexpr int kLarge = 227 * kKiB, kMiddle = 163 * kKiB, kSmall = 99 * kKiB;

constexpr std::array kTargets = {
    GpuTarget{8, 0, 108, kMiddle},  // A100
    GpuTarget{8, 0, 56, kMiddle},   // A30
    GpuTarget{8, 6, 84, kSmall},    // A40, RTX A6000
    GpuTarget{8, 6, 82, kSmall},    // RTX 3090
    GpuTarget{8, 6, 72, kSmall},    // A10
    GpuTarget{8, 7, 16, kMiddle},   // Jetson AGX Orin
    GpuTarget{8, 9, 142, kSmall},   // L40S
    GpuTarget{8, 9, 128, kSmall},   // RTX 4090
    GpuTarget{8, 9, 58, kSmall},    // L4
    GpuTarget{9, 0, 132, kLarge},   // H100 SXM, H200
    GpuTarget{9, 0, 114, kLarge},   // H100 PCIe
    GpuTarget{10, 0, 148, kLarge},  // B200
    GpuTarget{12, 0, 188, kSmall},  // RTX PRO 6000
    GpuTarget{12, 0, 170, kSmall},  // RTX 5090
};

std::string arch_of(const GpuTarget& target) { return jit::name_of(jit::Arch{target.major, target.minor}); }

}  // namespace

std::vector<std::string> gpu_architectures() {
  std::vector<std::string> list;
  for (const GpuTarget& target : kTargets) {
    if (list.empty() || list.back() != arch_of(target)) list.push_back(arch_of(target));
  }
  return list;
}

std::vector<GpuTarget> gpu_targets(std::string_view arch, const std::string& argument) {
  std::vector<GpuTarget> list;
  for (const GpuTarget& target : kTargets) {
    if (arch == arch_of(target)) list.push_back(target);
  }
  if (!list.empty()) return list;
  std::string known;
  for (const std::string& name : gpu_architectures()) known.append(known.empty() ? "" : ", ").append(name);
  throw InvalidArgument(argument, std::string("'").append(arch).append("'"), known);
}

std::vector<GpuTarget> gpu_targets_here() {
  std::vector<GpuTarget> list;
  try {
    for (int i = 0; i < jit::device_count(); ++i) {
      const GpuTarget target = jit::target_of(jit::device(i));
      if (std::find(list.begin(), list.end(), target) == list.end()) list.push_back(target);
    }
  } catch (const Unsupported&) {  // no driver, no device
    return {};
  }
  return list;
}

}  // namespace vicus
