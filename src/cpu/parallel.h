// Tasks over threads, each with its own scratch memory.
#ifndef VICUS_CPU_PARALLEL_H_
#define VICUS_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "cpu/threads.h"

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

/// Calls `run(task, scratch)` for every task below `tasks`, by at most `threads` workers; a free worker takes the next
/// task. Scratch is taken before the workers start; what a task throws is thrown again after they ended.
template <class Run>
void parallel_tasks(int threads, std::int64_t tasks, std::size_t scratch_bytes, const Run& run) {
  if (tasks <= 0) return;
  const int team = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  struct Shared {
    const Run& run;
    std::int64_t tasks;
    std::size_t scratch_bytes;
    std::byte* scratch;
    std::atomic<std::int64_t> next{0};
    std::mutex mutex = {};
    std::exception_ptr failure = {};
  } shared{run, tasks, scratch_bytes, ScratchPool::get(scratch_bytes * static_cast<std::size_t>(team))};
  if (team == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) run(task, shared.scratch);
    return;
  }
  const auto work = [](int worker, void* context) {
    auto& s = *static_cast<Shared*>(context);
    std::byte* const scratch = s.scratch + s.scratch_bytes * static_cast<std::size_t>(worker);
    for (std::int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) {
      try {
        s.run(task, scratch);
      } catch (...) {
        const std::lock_guard lock(s.mutex);
        s.failure = std::current_exception();
      }
    }
  };
  run_team(team, work, &shared);
  if (shared.failure) std::rethrow_exception(shared.failure);
}

}  // namespace vicus::cpu

#endif  // VICUS_CPU_PARALLEL_H_
