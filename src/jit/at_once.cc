#include "jit/at_once.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace vicus::jit {

void at_once(std::size_t count, const std::function<void(std::size_t)>& work, std::size_t threads) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;  // of the failure
  std::exception_ptr failure;
  std::size_t failed = count;
  const auto take = [&]() noexcept {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        work(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (i < failed) failure = std::current_exception();
        failed = std::min(failed, i);
        next = count;
      }
    }
  };
  {
    std::vector<std::jthread> others;
    const std::size_t cores = std::max(std::thread::hardware_concurrency(), 1U);
    const std::size_t most = std::min(count, threads > 0 ? threads : cores);
    try {
      while (others.size() + 1 < most) others.emplace_back(take);
      take();
    } catch (const std::system_error&) {  // no more threads to be had: those that there are do it
      take();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace vicus::jit
