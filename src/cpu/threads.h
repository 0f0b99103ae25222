// Where the CPU engine's threads come from: chosen when the library is linked. libvicus takes OpenMP's
// (threads_openmp.cc); a host program with a pool of its own links another implementation of these functions, so that
// two pools never compete for the processors.
#ifndef VICUS_CPU_THREADS_H_
#define VICUS_CPU_THREADS_H_

namespace vicus::cpu {

/// Threads of a parallel region when the caller does not say.
[[nodiscard]] int max_threads() noexcept;

/// Calls `body(worker, context)` once for every worker below `team`, at the same time where there are threads for it,
/// and returns when all have ended. `body` must not throw, and must not wait for another worker.
void run_team(int team, void (*body)(int worker, void* context), void* context);

}  // namespace vicus::cpu

#endif  // VICUS_CPU_THREADS_H_
