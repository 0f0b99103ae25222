// Which of Highway's targets the CPU engine is compiled for. Included before any Highway header.
//
// SSE4 (with its companions, every x86-64 since 2008) is the oldest: without it `supports()` says so. Vectors of unknown
// length (SVE, RVV) are off, because the kernels keep arrays of vectors in registers. VICUS_DISABLED_TARGETS takes away
// more, for builds that must compile fast.
#ifndef VICUS_CPU_TARGETS_H_
#define VICUS_CPU_TARGETS_H_

#ifndef VICUS_DISABLED_TARGETS
#define VICUS_DISABLED_TARGETS 0
#endif
#define HWY_DISABLED_TARGETS \
  (VICUS_DISABLED_TARGETS | HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#if defined(__x86_64__)
#define HWY_BASELINE_TARGETS HWY_SSE4
#endif

#endif  // VICUS_CPU_TARGETS_H_
