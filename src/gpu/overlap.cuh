// Kernels of a call follow each other. One that begins while blocks of the one before still run (programmatic dependent launch,
// since sm_90: Loaded::launch) waits here for all that was written before it.
#pragma once

namespace vicus::gpu {

// The next kernel may have its blocks where no more of this one begin: their first loads, of what the call was given, lie
// beside the end of this one. Not for kernels of others, which know nothing of what may still run: `followed` by one of ours.
__device__ __forceinline__ void let_next_begin(bool followed) {
#if __CUDA_ARCH__ >= 900
  if (followed) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// By every thread that reads, or overwrites, what kernels before wrote.
__device__ __forceinline__ void await_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of kernels with nothing to do beforehand.
__device__ __forceinline__ void begin_after_others(bool followed) {
  let_next_begin(followed);
  await_kernels_before();
}

}  // namespace vicus::gpu
