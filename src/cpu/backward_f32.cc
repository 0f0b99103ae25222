#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_f32.cc"
#include "cpu/targets.h"
// The order of these matters: foreach_target includes this file once more for each target.
#include <hwy/foreach_target.h>
//
#include "cpu/backward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
void backward_task_float(BackwardContext& context, std::int64_t task, std::byte* scratch) {
  backward_task<float>(context, task, scratch);
}
}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vicus::cpu {
HWY_EXPORT(backward_task_float);
void backward_task_f32(BackwardContext& context, std::int64_t task, std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(backward_task_float)(context, task, scratch);
}
}  // namespace vicus::cpu
#endif
