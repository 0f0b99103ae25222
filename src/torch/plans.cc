#include "torch/plans.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <list>
#include <mutex>
#include <string>

#include "cpu/threads.h"
#include "jit/device.h"
#include "vicus/error.h"

namespace vicus::binding {
namespace {

// A model has tens of distinct problems; a step of packed sequences has one, that the next step replaces. Packed and
// padded problems hold lists as long as their batch, so few of them are kept.
constexpr std::size_t kPlans = 256;
constexpr std::size_t kPlansWithLists = 8;

/// The most recently used plans, found by comparing whole problems: a field that a later version adds cannot be forgotten,
/// as it could in a hash, and comparisons end at the first difference.
class PlanCache {
 public:
  explicit PlanCache(std::size_t capacity) : capacity_(capacity) {}

  std::shared_ptr<const Plan> get(const Problem& problem, const PlanOptions& options, int threads, bool* made) {
    if (auto plan = find(problem, options, threads)) return plan;
    auto plan = std::make_shared<const Plan>(choose_plan(problem, options));  // slow: not under the lock
    const std::lock_guard lock(mutex_);
    entries_.push_front({problem, options, threads, plan});
    if (entries_.size() > capacity_) entries_.pop_back();
    if (made != nullptr) *made = true;
    return plan;
  }

 private:
  struct Entry {
    Problem problem;
    PlanOptions options;
    int threads;
    std::shared_ptr<const Plan> plan;
  };

  std::shared_ptr<const Plan> find(const Problem& problem, const PlanOptions& options, int threads) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) {
      return e.threads == threads && e.problem == problem && e.options == options;
    });
    if (found == entries_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found);
    return found->plan;
  }

  const std::size_t capacity_;
  std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
};

bool has_lists(const Problem& problem) {
  const auto* dense = std::get_if<Dense>(&problem.mask);
  return dense != nullptr && !(dense->key_lengths.empty() && dense->cumulative_queries.empty());
}

int to_int(const char* name, std::int64_t value) {
  if (value < 0 || value > std::numeric_limits<int>::max()) {
    throw InvalidArgument(name, std::to_string(value), "0 to 2^31 - 1");
  }
  return static_cast<int>(value);
}

template <class E>
E to_enum(const char* name, std::int64_t value, E last) {
  if (value < 0 || value > static_cast<std::int64_t>(last)) {
    throw InvalidArgument(name, std::to_string(value), "0 to " + std::to_string(static_cast<int>(last)));
  }
  return static_cast<E>(value);
}

std::array<int, 3> to_extents(const char* name, std::span<const std::int64_t> values) {
  return {to_int(name, values[0]), to_int(name, values[1]), to_int(name, values[2])};
}

}  // namespace

PlanOptions plan_options(const Place& place, std::span<const std::int64_t> options, Pass pass) {
  constexpr std::size_t kEngine = 0, kDeterministic = 1, kKvParallelism = 2, kMemory = 3, kSplits = 4, kForwardTile = 7,
                        kBackwardTile = 10, kKeyTile = 13, kCount = 16;
  PlanOptions result;
  if (place.cuda) {
    result.gpu = jit::target_of(jit::device(place.device));
  }
  if (options.empty()) return result;
  if (options.size() != kCount) {
    throw InvalidArgument("options", std::to_string(options.size()) + " values", "none, or " + std::to_string(kCount));
  }
  const auto engine = to_enum("options.engine", options[kEngine], place.cuda ? Engine::sm90 : Engine::cpu);
  if (!place.cuda || runs_on_gpu(engine)) result.engine = engine;
  result.backward.deterministic = options[kDeterministic] != 0;
  result.backward.kv_parallelism = options[kKvParallelism] != 0;
  result.backward.memory = to_enum("options.memory", options[kMemory], MemoryPreference::unrestricted);
  result.backward.kv_splits = to_extents("kv_splits", options.subspan(kSplits, 3));
  const std::size_t tile = pass == Pass::forward ? kForwardTile : kBackwardTile;
  result.tile_q = to_extents("tile_q", options.subspan(tile, 3));
  if (pass == Pass::forward) result.tile_kv = to_extents("tile_kv", options.subspan(kKeyTile, 3));
  return result;
}

std::shared_ptr<const Plan> plan_for(const Problem& problem, const PlanOptions& options, bool* made) {
  static PlanCache plain(kPlans);
  static PlanCache with_lists(kPlansWithLists);
  return (has_lists(problem) ? with_lists : plain).get(problem, options, cpu::max_threads(), made);
}

}  // namespace vicus::binding
