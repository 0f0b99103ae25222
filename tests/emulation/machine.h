// One multiprocessor on the CPU: the threads of a block are fibers of the calling thread, which change only where a
// kernel waits for other threads, in an order that is random but always the same. Blocks run one after the other.
//
// Kernels see this through cuda.h and ptx.h; the stand-in driver (tests/jit/fake_cuda.cc) launches them.
#ifndef VICUS_TESTS_EMULATION_MACHINE_H_
#define VICUS_TESTS_EMULATION_MACHINE_H_

#include <cstdint>

namespace emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarp = 32, kAllLanes = ~0u, kMostThreads = 1024, kMostSharedBytes = 256 << 10;

/// Where a kernel is, for the thread that runs.
struct Place {
  unsigned thread = 0;
  Dim3 block, blocks, threads;
  unsigned char* shared = nullptr;  ///< dynamic shared memory, aligned to 1024 bytes
};
extern Place place;

/// Ends the launch with this error, which names the block and the thread. printf's format.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// What the lanes of a warp do together: `run` is given the operands of every lane of `mask`, by lane, once all have
/// come. Their memory stays theirs until each returns from here.
using Together = void (*)(void* const* operands, unsigned mask);
void meet(unsigned mask, void* operands, Together run);
/// The same of all lanes.
template <class Operands>
void meet(Operands& operands, Together run) {
  meet(kAllLanes, &operands, run);
}

/// Waits at barrier `id` until `threads` threads came, or only arrives. Barrier 0 without a number of threads is of all
/// that are not done. Returns whether any thread came with a flag.
bool block_barrier(unsigned id, unsigned threads, bool waits, bool flag = false);

/// Lets others run until `wake` is called with the same object, on which the thread can then look again.
void sleep_on(const void* object);
void wake(const void* object);

using Kernel = void (*)(const void* args);

struct Launch {
  Kernel kernel;
  Dim3 blocks;
  unsigned threads, shared_bytes;
  const void* args;
};

/// Runs a launch to its end; what is wrong with it, or nullptr.
const char* run(const Launch& launch);

/// Forgets what a block left behind in emulated parts of the machine: called at the start of every block.
void reset_ptx();

}  // namespace emulation

#endif  // VICUS_TESTS_EMULATION_MACHINE_H_
