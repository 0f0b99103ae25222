#include "machine.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

namespace emulation {

Place place;

namespace {

constexpr unsigned kGuardBytes = 1024;  // behind shared memory, which nobody may write
// What shared memory holds at first, in turns, as bytes: NaN of every type, and large numbers, as kernels have a careful
// path for rows that are not finite.
constexpr unsigned char kPoison[2] = {0xff, 0x4b};

/// Lanes of a warp on their way to one instruction.
struct Meeting {
  unsigned mask = 0, came = 0;
  Together together = nullptr;
  std::array<void*, kWarp> operands{};
};

struct Barrier {
  unsigned came = 0;
  bool flag = false, result = false;
  std::vector<unsigned> waiting;
};

class Machine {
 public:
  const char* run(const Launch& launch) {
    launch_ = &launch;
    error_.clear();
    place.blocks = launch.blocks;
    place.threads = {launch.threads, 1, 1};
    if (launch.threads == 0 || launch.threads > kMostThreads || launch.shared_bytes > kMostSharedBytes) {
      return "the launch has too many threads or too much shared memory";
    }
    for (unsigned y = 0; y < launch.blocks.y && error_.empty(); ++y) {
      for (unsigned x = 0; x < launch.blocks.x && error_.empty(); ++x) run_block({x, y, 0});
    }
    return error_.empty() ? nullptr : error_.c_str();
  }

  [[noreturn]] void fail(const char* text) {
    error_ = where() + ", thread " + std::to_string(place.thread) + ": " + text;
    intact_ = 0;  // fibers are in the midst of things: none is entered again
    Fiber::change(fibers_.at(place.thread), main_);
    std::abort();  // nobody comes back
  }

  void meet(unsigned mask, void* operands, Together together) {
    const unsigned lane = place.thread % kWarp;
    if ((mask >> lane & 1) == 0) emulation::fail("a lane that is not in the mask %08x", mask);
    std::vector<Meeting>& here = meetings_.at(place.thread / kWarp);
    auto meeting = std::find_if(here.begin(), here.end(), [&](const Meeting& m) { return m.mask == mask; });
    if (meeting == here.end()) meeting = here.insert(here.end(), Meeting{mask, 0, together, {}});
    if (meeting->together != together) emulation::fail("lanes of a warp came to different instructions");
    meeting->operands.at(lane) = operands;
    meeting->came |= 1u << lane;
    if (meeting->came != mask) return wait();
    const Meeting complete = *meeting;
    here.erase(meeting);
    if (together != nullptr) together(complete.operands.data(), mask);
    for (unsigned other = 0; other < kWarp; ++other) {
      if (other != lane && (mask >> other & 1) != 0) ready_.push_back(place.thread - lane + other);
    }
  }

  bool block_barrier(unsigned id, unsigned threads, bool waits, bool flag) {
    Barrier& barrier = barriers_[id];
    barrier.flag = barrier.flag || flag;
    ++barrier.came;
    if (complete(barrier, threads == 0 ? running_ : threads)) return barrier.result;
    if (!waits) return false;
    barrier.waiting.push_back(place.thread);
    wait();
    return barrier.result;
  }

  void sleep_on(const void* object) {
    sleeping_.emplace(object, place.thread);
    wait();
  }

  void wake(const void* object) {
    const auto [first, last] = sleeping_.equal_range(object);
    for (auto it = first; it != last; ++it) ready_.push_back(it->second);
    sleeping_.erase(first, last);
  }

 private:
  /// Of fibers: blocks without end, each of which begins when somebody makes the fiber ready.
  static void entry();

  void run_block(Dim3 block) {
    place.block = block;
    place.shared = shared();
    const unsigned char poison = kPoison[block.x % 2];
    std::memset(place.shared, poison, launch_->shared_bytes + kGuardBytes);
    barriers_.clear();
    sleeping_.clear();
    for (std::vector<Meeting>& warp : meetings_) warp.clear();
    reset_ptx();
    running_ = launch_->threads;
    ready_.clear();
    for (unsigned i = 0; i < running_; ++i) {
      if (i >= intact_) fibers_.at(i).prepare(entry);
      ready_.push_back(i);
    }
    intact_ = std::max(intact_, running_);
    change_to_next(main_);
    if (!error_.empty()) return;
    const unsigned char* const guard = place.shared + launch_->shared_bytes;
    if (std::any_of(guard, guard + kGuardBytes, [&](unsigned char byte) { return byte != poison; })) {
      error_ = where() + ": shared memory was written beyond its " + std::to_string(launch_->shared_bytes) + " bytes";
    }
  }

  static std::string where() { return "block " + std::to_string(place.block.x) + " " + std::to_string(place.block.y); }

  static unsigned char* shared() {
    alignas(1024) static std::array<unsigned char, kMostSharedBytes + kGuardBytes> memory;
    return memory.data();
  }

  bool complete(Barrier& barrier, unsigned threads) {
    if (barrier.came < threads) return false;
    ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier = {.came = 0, .flag = false, .result = barrier.flag, .waiting = {}};
    return true;
  }

  void wait() {
    const unsigned me = place.thread;
    if (ready_.empty()) emulation::fail("all threads wait");
    change_to_next(fibers_.at(me));
    place.thread = me;
  }

  void done() {
    const unsigned me = place.thread;
    --running_;
    if (Barrier& all = barriers_[0]; all.came > 0) complete(all, running_);
    if (running_ == 0) {
      Fiber::change(fibers_.at(me), main_);
    } else {
      wait();
    }
    place.thread = me;
  }

  void change_to_next(Fiber& from) {
    const std::size_t i = random_() % ready_.size();
    std::swap(ready_.at(i), ready_.back());
    const unsigned next = ready_.back();
    ready_.pop_back();
    place.thread = next;
    Fiber::change(from, fibers_.at(next));
  }

  const Launch* launch_ = nullptr;
  std::string error_;
  std::array<Fiber, kMostThreads> fibers_;
  Fiber main_;
  unsigned intact_ = 0;   // fibers that wait for their next block
  unsigned running_ = 0;  // threads of this block
  std::vector<unsigned> ready_;
  std::array<std::vector<Meeting>, kMostThreads / kWarp> meetings_;
  std::map<unsigned, Barrier> barriers_;
  std::multimap<const void*, unsigned> sleeping_;
  std::minstd_rand random_;
};

Machine& machine() {
  static Machine made;
  return made;
}

void Machine::entry() {
  while (true) {
    machine().launch_->kernel(machine().launch_->args);
    machine().done();
  }
}

}  // namespace

void fail(const char* format, ...) {
  std::array<char, 400> text{};
  std::va_list list;
  va_start(list, format);
  std::vsnprintf(text.data(), text.size(), format, list);
  va_end(list);
  machine().fail(text.data());
}

void meet(unsigned mask, void* operands, Together run) { machine().meet(mask, operands, run); }
bool block_barrier(unsigned id, unsigned threads, bool waits, bool flag) {
  return machine().block_barrier(id, threads, waits, flag);
}
void sleep_on(const void* object) { machine().sleep_on(object); }
void wake(const void* object) { machine().wake(object); }
const char* run(const Launch& launch) { return machine().run(launch); }

}  // namespace emulation
