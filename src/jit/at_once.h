// Work for several threads: compilations, which take long and have nothing to do with each other.
#ifndef VICUS_JIT_AT_ONCE_H_
#define VICUS_JIT_AT_ONCE_H_

#include <cstddef>
#include <functional>

namespace vicus::jit {

/// Calls `work(0)` to `work(count - 1)`, on `threads` threads (0: as many as there are cores), the caller's among them, and
/// returns when all have ended. After an exception no more calls begin; of several, that of the lowest number is thrown.
void at_once(std::size_t count, const std::function<void(std::size_t)>& work, std::size_t threads = 0);

}  // namespace vicus::jit

#endif  // VICUS_JIT_AT_ONCE_H_
