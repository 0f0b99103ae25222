#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward_f32.cc"
#include "cpu/targets.h"
// The order of these matters: foreach_target includes this file once more for each target.
#include <hwy/foreach_target.h>
//
#include "cpu/forward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vicus::cpu::HWY_NAMESPACE {
void forward_task_float(const ForwardContext& context, std::int64_t task, std::byte* scratch) {
  forward_task<float>(context, task, scratch);
}
bool folds_float() { return kFolds<float, kFoldRows>; }
}  // namespace vicus::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vicus::cpu {
HWY_EXPORT(forward_task_float);
HWY_EXPORT(folds_float);
bool folds_f32() { return HWY_DYNAMIC_DISPATCH(folds_float)(); }
void forward_task_f32(const ForwardContext& context, std::int64_t task, std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(forward_task_float)(context, task, scratch);
}
}  // namespace vicus::cpu
#endif
