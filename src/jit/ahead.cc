#include "jit/ahead.h"

#include <unistd.h>

#include <exception>
#include <string>
#include <system_error>
#include <utility>

#include "core/log.h"
#include "jit/at_once.h"

namespace vicus::jit {
namespace {

constexpr unsigned kFewCores = 4;  // below, the call that is made now would be slower

Ahead& of_process() {
  static Ahead one;
  return one;
}

}  // namespace

Ahead::Ahead(std::size_t most) : most_(most), owner_(::getpid()) {}

bool Ahead::forked() const { return ::getpid() != owner_; }

void Ahead::add(std::vector<Source> sources, Arch arch) {
  if (forked()) return;  // the mutex may be locked for ever
  const std::lock_guard lock(mutex_);
  if (ended_ || queue_.size() >= most_) return;
  queue_.push_back({std::move(sources), arch});
  if (running_) return;
  if (thread_.joinable()) thread_.join();  // it has left its last turn
  try {
    thread_ = std::thread([this] { run(); });
    running_ = true;
  } catch (const std::system_error&) {  // no more threads to be had
    queue_.clear();
  }
}

void Ahead::end() {
  if (forked()) {
    if (thread_.joinable()) thread_.detach();  // it is not here
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    queue_.clear();
  }
  if (thread_.joinable()) thread_.join();
}

bool Ahead::take(Work& work) {
  const std::lock_guard lock(mutex_);
  running_ = !queue_.empty();
  if (!running_) return false;
  work = std::move(queue_.front());
  queue_.pop_front();
  return true;
}

void Ahead::run() {
  for (Work work; take(work);) {
    try {
      at_once(work.sources.size(), [&](std::size_t i) { static_cast<void>(cubin(work.sources[i], work.arch)); });
    } catch (const std::exception& error) {
      log(LogLevel::debug, std::string("not compiled ahead: ") + error.what());
    }
  }
}

void compile_ahead(std::vector<Source> sources, Arch arch) {
  // Looks for compiler and cache first, so that they are torn down after the threads that use them.
  if (std::thread::hardware_concurrency() < kFewCores || !compiles_into_cache()) return;
  log(LogLevel::info, "compiling " + std::to_string(sources.size()) + " kernels of gradients ahead");
  of_process().add(std::move(sources), arch);
}

void end_ahead() { of_process().end(); }

}  // namespace vicus::jit
