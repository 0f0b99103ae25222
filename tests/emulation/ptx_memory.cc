// Asynchronous copies, the barriers that they count at, and matrices between shared memory and registers.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "box_map.h"
#include "machine.h"
#include "ptx.h"
#include "shared.h"

namespace emulation {

unsigned char* shared_at(std::uint32_t address, unsigned bytes) {
  if (address % bytes != 0) fail("shared memory at %u is not aligned to %u bytes", address, bytes);
  if (address + bytes > kMostSharedBytes) fail("shared memory at %u is beyond all of it", address);
  return place.shared + address;
}

namespace {

// What copies will overwrite, as bytes: large numbers of every type. NaN would send kernels to their careful path, which
// reads the tensors themselves.
constexpr unsigned char kNotYet = 0x4b;

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // or nothing: zeros
  unsigned bytes;
};

// Of one thread: copies that were committed together, and those that are not committed yet.
struct Copies {
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct BoxLoad {
  std::uint32_t to;
  BoxMap map;
  std::array<int, BoxMap::kRank> at;
};

// A box that is stored to a tensor, or added to it, `to` where it comes from.
struct BoxStore {
  BoxLoad box;
  void (*store_row)(const BoxLoad& box, std::uint32_t row, const std::array<long long, BoxMap::kRank>& at);
};

// Of one thread. They are read when the thread waits for it.
struct BoxStores {
  std::vector<std::vector<BoxStore>> groups;
  std::vector<BoxStore> open;
};

// A barrier in shared memory: a phase ends when all have arrived and all announced bytes were written.
struct PhaseBarrier {
  int arrivals = 0, missing = 0;
  long long bytes = 0;
  unsigned phase = 0;
  // That nobody has waited for yet: boxes, and copies of threads that arrive when those are there.
  std::vector<BoxLoad> loads;
  std::vector<std::vector<Copy>> copies;
};

std::array<Copies, kMostThreads> copies;
std::array<BoxStores, kMostThreads> box_stores;
std::map<std::uint32_t, PhaseBarrier> phase_barriers;

PhaseBarrier& phase_barrier(std::uint32_t address) {
  const auto found = phase_barriers.find(address);
  if (found == phase_barriers.end()) fail("there is no barrier at %u", address);
  return found->second;
}

void end_phase(PhaseBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.phase ^= 1;
  wake(&barrier);
}

void arrive(PhaseBarrier& barrier) {
  if (barrier.missing == 0) fail("a barrier has more arrivals than it was made for");
  --barrier.missing;
  end_phase(barrier);
}

void make(const std::vector<Copy>& list) {
  for (const Copy& copy : list) {
    if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
    else std::memset(copy.to, 0, copy.bytes);
  }
}

constexpr std::uint32_t kBoxRow = 128;  // bytes: 64 features

// Calls `use(row, coordinates)` for every row of a box as it lies in shared memory.
template <class Use>
void for_rows(const BoxLoad& load, const Use& use) {
  const BoxMap& map = load.map;
  const auto count = [&](unsigned axis) { return (map.box[axis] + map.step[axis] - 1) / map.step[axis]; };
  std::uint32_t row = 0;
  std::array<long long, BoxMap::kRank> at{load.at[0]};
  for (int i4 = 0; i4 < count(4); ++i4) {
    at[4] = load.at[4] + static_cast<long long>(i4) * map.step[4];
    for (int i3 = 0; i3 < count(3); ++i3) {
      at[3] = load.at[3] + static_cast<long long>(i3) * map.step[3];
      for (int i2 = 0; i2 < count(2); ++i2) {
        at[2] = load.at[2] + static_cast<long long>(i2) * map.step[2];
        for (int i1 = 0; i1 < count(1); ++i1) {
          at[1] = load.at[1] + static_cast<long long>(i1) * map.step[1];
          use(row++, at);
        }
      }
    }
  }
}

// Where a row of a tensor starts; whether there is such.
const unsigned char* row_of(const BoxMap& map, const std::array<long long, BoxMap::kRank>& at, bool& inside) {
  const unsigned char* row = map.data;
  inside = true;
  for (unsigned axis = 1; axis < BoxMap::kRank; ++axis) {
    inside = inside && at[axis] >= 0 && at[axis] < map.size[axis];
    row += at[axis] * static_cast<long long>(map.stride[axis - 1]);
  }
  return row;
}

// The elements of a row that are outside the tensor are zero.
void load_row(const BoxLoad& load, std::uint32_t row, const std::array<long long, BoxMap::kRank>& at) {
  const BoxMap& map = load.map;
  bool inside = true;
  const unsigned char* from = row_of(map, at, inside);
  for (std::uint32_t i = 0; i < map.box[0]; ++i) {
    const long long feature = at[0] + i;
    ptx::u16 value = 0;
    if (inside && feature >= 0 && feature < map.size[0]) std::memcpy(&value, from + 2 * feature, 2);
    std::memcpy(shared_at(swizzled(load.to + row * kBoxRow + 2 * i), 2), &value, 2);
  }
}

// Calls `use(element of the tensor, address in shared memory)` for what a row of a box of `bytes` an element has inside the
// tensor.
template <class AddressOf, class Use>
void for_inside(const BoxLoad& box, const std::array<long long, BoxMap::kRank>& at, unsigned bytes,
                const AddressOf& address_of, const Use& use) {
  const BoxMap& map = box.map;
  bool inside = true;
  unsigned char* const row = const_cast<unsigned char*>(row_of(map, at, inside));
  for (std::uint32_t i = 0; i < map.box[0] && inside; ++i) {
    const long long feature = at[0] + i;
    if (feature < 0 || feature >= map.size[0]) continue;
    use(row + bytes * feature, shared_at(address_of(i), bytes));
  }
}

// The elements of a row that are outside the tensor are left out.
void store_row(const BoxLoad& box, std::uint32_t row, const std::array<long long, BoxMap::kRank>& at) {
  const auto address_of = [&](std::uint32_t i) { return swizzled(box.to + row * kBoxRow + 2 * i); };
  for_inside(box, at, 2, address_of, [](unsigned char* to, const unsigned char* from) { std::memcpy(to, from, 2); });
}
void add_row(const BoxLoad& box, std::uint32_t row, const std::array<long long, BoxMap::kRank>& at) {
  const auto address_of = [&](std::uint32_t i) { return box.to + 4 * (row * box.map.box[0] + i); };
  for_inside(box, at, 4, address_of, [](unsigned char* to, const unsigned char* from) {
    float value = 0, sum = 0;
    std::memcpy(&value, from, 4);
    std::memcpy(&sum, to, 4);
    sum += value;
    std::memcpy(to, &sum, 4);
  });
}

void open_store(const void* map, ptx::List<int, 5> at, std::uint32_t shared, decltype(BoxStore::store_row) store_row) {
  BoxLoad box{.to = shared, .map = {}, .at = {}};
  std::memcpy(&box.map, map, sizeof(box.map));
  if (box.map.rank != BoxMap::kRank) fail("a box of a tensor that was not described");
  for (unsigned i = 0; i < at.size(); ++i) box.at[i] = *at[i];
  box_stores.at(place.thread).open.push_back({box, store_row});
}

struct Matrix {
  std::uint32_t address;  // of the row that this lane names
  std::array<ptx::u32*, 4> registers;
};

// Calls `use(register, row, column)` for every 16-bit half of the registers that hold four 8 by 8 matrices.
template <bool kTransposed, class Use>
void for_halves(void* const* lanes, const Use& use) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned row = kTransposed ? lane % 4 * 2 + half : lane / 4;
        const unsigned column = kTransposed ? lane / 4 : lane % 4 * 2 + half;
        const std::uint32_t start = static_cast<Matrix*>(lanes[8 * i + row])->address;
        auto* const word = reinterpret_cast<unsigned char*>(static_cast<Matrix*>(lanes[lane])->registers[i]);
        use(shared_at(start, 16) + 2 * column, word + 2 * half);
      }
    }
  }
}

template <bool kTransposed>
void load_matrices(void* const* lanes, unsigned /*mask*/) {
  for_halves<kTransposed>(lanes, [](unsigned char* shared, unsigned char* half) { std::memcpy(half, shared, 2); });
}
void store_matrices(void* const* lanes, unsigned /*mask*/) {
  for_halves<false>(lanes, [](unsigned char* shared, unsigned char* half) { std::memcpy(shared, half, 2); });
}

}  // namespace

void reset_copies() {
  for (Copies& of_thread : copies) of_thread = {};
  for (BoxStores& of_thread : box_stores) of_thread = {};
  phase_barriers.clear();
}

}  // namespace emulation

namespace ptx {

using emulation::copies, emulation::phase_barriers, emulation::place, emulation::shared_at;

void cp_async(u32 shared, const void* global, int bytes, int present) {
  const auto count = static_cast<unsigned>(bytes);
  if (present != 0 && std::bit_cast<std::uintptr_t>(global) % count != 0) {
    emulation::fail("a copy of %d bytes from %p, which is not aligned", bytes, global);
  }
  if (present != 0 && present != bytes) emulation::fail("a copy of %d of %d bytes", present, bytes);
  unsigned char* const to = shared_at(shared, count);
  std::memset(to, emulation::kNotYet, count);
  const auto* const from = static_cast<const unsigned char*>(global);
  copies.at(place.thread).open.push_back({to, present != 0 ? from : nullptr, count});
}

void cp_async_commit_group() {
  emulation::Copies& mine = copies.at(place.thread);
  mine.groups.emplace_back(std::exchange(mine.open, {}));
}

void cp_async_wait_group(int pending) {
  auto& groups = copies.at(place.thread).groups;
  const std::size_t count = groups.size() - std::min(groups.size(), static_cast<std::size_t>(pending));
  for (std::size_t i = 0; i < count; ++i) emulation::make(groups[i]);
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(count));
}

void mbarrier_init_shared_cta_b64(u32 barrier, int arrivals) {
  static_cast<void>(shared_at(barrier, 8));
  phase_barriers[barrier] = {
      .arrivals = arrivals, .missing = arrivals, .bytes = 0, .phase = 0, .loads = {}, .copies = {}};
}

void mbarrier_arrive_shared_cta_b64(Unused /*state*/, u32 barrier) { arrive(emulation::phase_barrier(barrier)); }

void mbarrier_arrive_expect_tx_shared_cta_b64(Unused /*state*/, u32 barrier, int bytes) {
  emulation::PhaseBarrier& at = emulation::phase_barrier(barrier);
  at.bytes += bytes;
  arrive(at);
}

void cp_async_mbarrier_arrive_noinc_shared_cta_b64(u32 barrier) {
  emulation::PhaseBarrier& at = emulation::phase_barrier(barrier);
  at.copies.push_back(std::exchange(copies.at(place.thread).open, {}));
  emulation::wake(&at);  // who waits already makes them
}

void mbarrier_try_wait_parity_shared_cta_b64(bool& done, u32 barrier, u32 parity) {
  emulation::PhaseBarrier& at = emulation::phase_barrier(barrier);
  for (const emulation::BoxLoad& load : std::exchange(at.loads, {})) {
    emulation::for_rows(load, [&](u32 row, const auto& coordinates) {
      emulation::load_row(load, row, coordinates);
      at.bytes -= 2 * load.map.box[0];
    });
    end_phase(at);
  }
  for (const auto& list : std::exchange(at.copies, {})) {
    emulation::make(list);
    arrive(at);
  }
  if (at.phase % 2 == parity) emulation::sleep_on(&at);
  done = at.phase % 2 != parity;
}

void cp_async_bulk_tensor_5d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(u32 shared, const void* map,
                                                                                   List<int, 5> at, u32 barrier) {
  emulation::BoxLoad load{.to = shared, .map = {}, .at = {}};
  std::memcpy(&load.map, map, sizeof(load.map));
  if (load.map.rank != emulation::BoxMap::kRank) emulation::fail("a box of a tensor that was not described");
  if (shared % 1024 != 0) emulation::fail("a box to %u, which swizzling aligns otherwise", shared);
  if (2 * load.map.box[0] != emulation::kBoxRow) emulation::fail("a box of %u features", load.map.box[0]);
  for (unsigned i = 0; i < at.size(); ++i) load.at[i] = *at[i];
  emulation::for_rows(load, [&](u32 row, const auto& /*coordinates*/) {
    std::memset(shared_at(shared + row * emulation::kBoxRow, emulation::kBoxRow), emulation::kNotYet,
                emulation::kBoxRow);
  });
  emulation::PhaseBarrier& counts = emulation::phase_barrier(barrier);
  counts.loads.push_back(load);
  emulation::wake(&counts);  // who waits already fetches it
}

void cp_async_bulk_tensor_5d_global_shared_cta_tile_bulk_group(const void* map, List<int, 5> at, u32 shared) {
  if (shared % 1024 != 0) emulation::fail("a box from %u, which swizzling aligns otherwise", shared);
  emulation::open_store(map, at, shared, emulation::store_row);
}

void cp_reduce_async_bulk_tensor_5d_global_shared_cta_add_tile_bulk_group(const void* map, List<int, 5> at,
                                                                          u32 shared) {
  if (shared % 128 != 0) emulation::fail("a box from %u, which is not aligned to 128 bytes", shared);
  emulation::open_store(map, at, shared, emulation::add_row);
}

void cp_async_bulk_commit_group() {
  emulation::BoxStores& mine = emulation::box_stores.at(place.thread);
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void cp_async_bulk_wait_group_read(int pending) {
  emulation::BoxStores& mine = emulation::box_stores.at(place.thread);
  while (mine.groups.size() > static_cast<std::size_t>(pending)) {
    for (const auto& [box, store_row] : mine.groups.front()) {
      emulation::for_rows(box, [&](std::uint32_t row, const auto& where) { store_row(box, row, where); });
    }
    mine.groups.erase(mine.groups.begin());
  }
}

void ldmatrix_sync_aligned_m8n8_x4_shared_b16(List<u32, 4> to, u32 shared) {
  emulation::Matrix mine = {shared, to};
  emulation::meet(mine, emulation::load_matrices<false>);
}
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(List<u32, 4> to, u32 shared) {
  emulation::Matrix mine = {shared, to};
  emulation::meet(mine, emulation::load_matrices<true>);
}
void stmatrix_sync_aligned_m8n8_x4_shared_b16(u32 shared, List<u32, 4> from) {
  emulation::Matrix mine = {shared, from};
  emulation::meet(mine, emulation::store_matrices);
}

}  // namespace ptx
