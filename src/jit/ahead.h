// Compiling in the background what calls to come are likely to need: the backward pass of a training step.
#ifndef VICUS_JIT_AHEAD_H_
#define VICUS_JIT_AHEAD_H_

#include <sys/types.h>

#include <cstddef>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "jit/compile.h"

namespace vicus::jit {

/// Compiles into the user's cache, what was added first first, in threads of its own while there is work. Touches no GPU, so
/// it may run beside any capture. A child of fork() has none of it, and adds nothing.
class Ahead {
 public:
  explicit Ahead(std::size_t most = 32);
  ~Ahead() { end(); }
  Ahead(Ahead&&) = delete;
  Ahead(const Ahead&) = delete;
  Ahead& operator=(Ahead&&) = delete;
  Ahead& operator=(const Ahead&) = delete;

  /// Returns at once. `sources` are compiled together, those of one call. Dropped where `most` wait already; what does not
  /// compile is left to who needs it.
  void add(std::vector<Source> sources, Arch arch);

  /// Forgets what has not begun and waits for what has; nothing begins afterwards.
  void end();

 private:
  struct Work {
    std::vector<Source> sources;
    Arch arch;
  };

  [[nodiscard]] bool forked() const;
  [[nodiscard]] bool take(Work& work);
  void run();

  const std::size_t most_;
  const pid_t owner_;
  std::mutex mutex_;
  std::deque<Work> queue_;
  std::thread thread_;
  bool running_ = false, ended_ = false;
};

/// Adds to the one of the process. Who needs one of the kernels meanwhile waits for it in the cache, as for another process.
/// Nothing happens on machines of few cores, or where there is no compiler or no cache.
void compile_ahead(std::vector<Source> sources, Arch arch);

/// Ends it: before the process tears down what compilers use.
void end_ahead();

}  // namespace vicus::jit

#endif  // VICUS_JIT_AHEAD_H_
