// Stacks to change between. Changing is a jump, without the system call of swapcontext: kernels do it a million times.
#ifndef VICUS_TESTS_EMULATION_FIBERS_H_
#define VICUS_TESTS_EMULATION_FIBERS_H_

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace emulation {

/// A function with a stack of its own, below which lies a page that nobody may touch.
class Fiber {
 public:
  static constexpr std::size_t kStackBytes = std::size_t{256} << 10;

  Fiber() = default;
  ~Fiber();
  Fiber(Fiber&&) = delete;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(Fiber&&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// The next `enter` calls `entry`, which never returns; what the stack held is gone.
  void prepare(void (*entry)());

  /// From `from`, which continues when something enters it again.
  static void change(Fiber& from, Fiber& to);

 private:
  jmp_buf at_{};
  ucontext_t start_{};
  void* stack_ = nullptr;
  bool started_ = true;  // the fiber of a thread's own stack is
};

}  // namespace emulation

#endif  // VICUS_TESTS_EMULATION_FIBERS_H_
