// Kernels that are loaded and ready, by the caller's own description of them, and how they are launched.
//
// The hot path of a call is KernelCache::get with a key that is known, then launch: a shared lock, a search of a map by
// plain comparison, no text, no allocation. Everything else happens once per context and key.
#ifndef VICUS_JIT_MODULE_H_
#define VICUS_JIT_MODULE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <string>

#include "jit/at_once.h"
#include "jit/compile.h"
#include "jit/device.h"
#include "jit/driver.h"

namespace vicus::jit {

struct Kernel {
  CUfunction function = nullptr;
  int registers = 0, local_bytes = 0, shared_bytes = 0;  // local: stack and spills; shared: static
  std::size_t arg_bytes = 0;                             // 0: the driver is too old to tell
  bool can_overlap = false;                              // with the kernel before it; since sm_90 and CUDA 12.3
  std::string name;                                      // for messages
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

/// Compiles (or takes from the disk) and loads into the current context, for its device. The kernel may use all the
/// dynamic shared memory that the device has. Throws CompileError, Unsupported, DriverError.
[[nodiscard]] Kernel load_kernel(const Source& source);

/// Whether `stream` is being captured into a CUDA graph.
[[nodiscard]] bool capturing(void* stream);

/// Throws Unsupported when `stream` is being captured into a CUDA graph: compiling is no part of a graph.
void refuse_capture(void* stream);

/// Launches on `stream` (a CUstream or cudaStream_t) of the current context; `args` is the kernel's one argument. An
/// empty grid is nothing to do. `overlap`: the kernel waits by itself for what it needs of the stream's last launch, and may
/// begin before that ends (programmatic dependent launch), where the device and the driver can do that.
void launch(const Kernel& kernel, Dim3 grid, int threads, int dynamic_shared_bytes, void* stream, const void* args,
            std::size_t arg_bytes, bool overlap = false);

/// Blocks that one multiprocessor holds at a time.
[[nodiscard]] int blocks_per_multiprocessor(const Kernel& kernel, int threads, int dynamic_shared_bytes);

/// `Key` is a plain struct with operator<. Safe from many threads; kernels live as long as the cache.
template <class Key>
class KernelCache {
 public:
  /// The kernel of `key` in the current context. `make_source(key)` is called, and its result compiled, once per context
  /// and key, by one thread while others that need it wait; after a failure, by the next that asks. Throws as
  /// load_kernel and refuse_capture do.
  template <class MakeSource>
  const Kernel& get(const Key& key, void* stream, const MakeSource& make_source) {
    return find_or_make(key, make_source, [stream] { refuse_capture(stream); });
  }

  /// The same for many, whatever is being captured: loading is no work of a stream. Compiles several at a time.
  template <class MakeSource>
  void load(std::span<const Key> keys, const MakeSource& make_source) {
    const CUcontext context = thread_context();
    at_once(keys.size(), [&](std::size_t i) {
      const ContextGuard guard(context);
      find_or_make(keys[i], make_source, [] {});
    });
  }

  /// The kernel of `key` in the current context, null where it is not loaded.
  const Kernel* find(const Key& key) { return find(Place{current_context(), key}); }

 private:
  struct Place {
    std::uint64_t context;
    Key key;
    friend bool operator<(const Place& a, const Place& b) {
      return a.context != b.context ? a.context < b.context : a.key < b.key;
    }
  };
  struct Slot {
    std::mutex mutex;  // of the one who loads
    std::atomic<bool> ready{false};
    Kernel kernel;
  };

  template <class MakeSource, class Before>
  const Kernel& find_or_make(const Key& key, const MakeSource& make_source, const Before& before) {
    const Place place{current_context(), key};
    if (const Kernel* const found = find(place)) return *found;
    Slot& slot = slot_of(place);
    const std::lock_guard lock(slot.mutex);
    if (!slot.ready.load(std::memory_order_relaxed)) {
      before();
      slot.kernel = load_kernel(make_source(key));
      slot.ready.store(true, std::memory_order_release);
    }
    return slot.kernel;
  }

  const Kernel* find(const Place& place) {
    const std::shared_lock lock(mutex_);
    const auto found = slots_.find(place);
    if (found == slots_.end() || !found->second.ready.load(std::memory_order_acquire)) return nullptr;
    return &found->second.kernel;
  }

  Slot& slot_of(const Place& place) {
    const std::lock_guard lock(mutex_);
    return slots_[place];
  }

  std::shared_mutex mutex_;
  std::map<Place, Slot> slots_;  // a slot never moves
};

}  // namespace vicus::jit

#endif  // VICUS_JIT_MODULE_H_
