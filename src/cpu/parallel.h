// Tasks over OpenMP threads, each with its own scratch memory.
#ifndef VICUS_CPU_PARALLEL_H_
#define VICUS_CPU_PARALLEL_H_

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>

namespace vicus::cpu {

/// Scratch of the calling thread's parallel regions. Kept from call to call, because fresh pages cost as much as a small
/// attention; given back when the thread ends.
class ScratchPool {
 public:
  static std::byte* get(std::size_t bytes) {
    thread_local ScratchPool pool;
    if (pool.bytes_ < bytes) {
      pool.data_.reset();
      pool.bytes_ = 0;
      pool.data_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlign})));
      pool.bytes_ = bytes;
    }
    return pool.data_.get();
  }

 private:
  static constexpr std::size_t kAlign = 4096;
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_ = 0;
};

/// Calls `run(task, scratch)` for every task below `tasks`, on at most `threads` threads; a free thread takes the next
/// task. Scratch is taken before the threads start; what a task throws is thrown again after they ended. Many more threads
/// than processors would gain nothing, and OpenMP ends the process when it cannot make one.
template <class Run>
void parallel_tasks(int threads, std::int64_t tasks, std::size_t scratch_bytes, const Run& run) {
  if (tasks <= 0) return;
  const int most = std::max(4 * omp_get_num_procs(), 16);
  const int team = static_cast<int>(std::min<std::int64_t>(std::min(threads, most), tasks));
  std::byte* const scratch = ScratchPool::get(scratch_bytes * static_cast<std::size_t>(team));
  if (team == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) run(task, scratch);
    return;
  }
  std::exception_ptr failure;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (std::int64_t task = 0; task < tasks; ++task) {
    try {
      run(task, scratch + scratch_bytes * static_cast<std::size_t>(omp_get_thread_num()));
    } catch (...) {
#pragma omp critical(vicus_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace vicus::cpu

#endif  // VICUS_CPU_PARALLEL_H_
