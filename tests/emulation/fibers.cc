#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace emulation {

Fiber::~Fiber() {
  if (stack_ != nullptr) ::munmap(stack_, kStackBytes);
}

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) {
    void* const made =
        ::mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    stack_ = made;
    ::mprotect(stack_, static_cast<std::size_t>(::getpagesize()), PROT_NONE);
  }
  ::getcontext(&start_);
  start_.uc_stack.ss_sp = stack_;
  start_.uc_stack.ss_size = kStackBytes;
  start_.uc_link = nullptr;
  ::makecontext(&start_, entry, 0);
  started_ = false;
}

void Fiber::change(Fiber& from, Fiber& to) {
  if (_setjmp(from.at_) != 0) return;
  if (to.started_) _longjmp(to.at_, 1);
  to.started_ = true;
  ::setcontext(&to.start_);
}

}  // namespace emulation
