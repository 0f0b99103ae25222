// Matrix products of warps and of warpgroups, and the rounding of their operands. Sums are float32, one term after the
// other.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <vector>

#include "machine.h"
#include "ptx.h"
#include "shared.h"

namespace ptx {

u16 bf16_of(float x) {
  if (x != x) return 0x7fff;
  const u32 bits = std::bit_cast<u32>(x);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
u16 f16_of(float x) { return std::bit_cast<u16>(static_cast<_Float16>(x)); }
float of_bf16(u16 x) { return std::bit_cast<float>(u32{x} << 16); }
float of_f16(u16 x) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (u32 i = 0; i < values.size(); ++i) values[i] = std::bit_cast<_Float16>(static_cast<u16>(i));
    return values;
  }();
  return table[x];
}

}  // namespace ptx

namespace emulation {
namespace {

using ptx::List, ptx::u16, ptx::u32, ptx::u64;

constexpr unsigned kRows = 16, kFeatures = 16, kMostColumns = 256;

using Convert = float (*)(u16);

float half_of(u32 word, unsigned which, Convert convert) { return convert(static_cast<u16>(word >> 16 * which)); }

// c[row][column] += sum over `features` of a[row][feature] * b[feature][column].
template <unsigned kColumns>
void add_product(const float (*a)[kFeatures], const float (*b)[kColumns], unsigned features, unsigned columns,
                 float (*c)[kColumns]) {
  for (unsigned row = 0; row < kRows; ++row) {
    for (unsigned k = 0; k < features; ++k) {
      const float factor = a[row][k];
      for (unsigned column = 0; column < columns; ++column) c[row][column] += factor * b[k][column];
    }
  }
}

// Calls `use(lane, register, row, column)` for the sums that lanes hold: of rows lane / 4 and lane / 4 + 8, columns
// 2 (lane % 4) and the next of every eight.
template <class Use>
void for_sums(unsigned columns, const Use& use) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < columns / 2; ++i) use(lane, i, lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
  }
}

// --- mma.sync ----------------------------------------------------------------------------------------------------------------

struct WarpProduct {
  List<float, 4> d, c;
  List<u32, 4> a;
  List<u32, 2> b;
};

enum class Type { bf16, f16, tf32 };

// Of 32-bit features there are half as many, one in each register.
template <Type kType>
void warp_product(void* const* lanes, unsigned /*mask*/) {
  constexpr unsigned kColumns = 8, kInRegister = kType == Type::tf32 ? 1 : 2;
  const auto of = [&](unsigned lane) -> WarpProduct& { return *static_cast<WarpProduct*>(lanes[lane]); };
  const auto value = [](u32 word, unsigned which) {
    if constexpr (kType == Type::tf32) return std::bit_cast<float>(word & 0xffffe000);
    else return half_of(word, which, kType == Type::f16 ? ptx::of_f16 : ptx::of_bf16);
  };
  float a[kRows][kFeatures], b[kFeatures][kColumns], c[kRows][kColumns];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned which = 0; which < kInRegister; ++which) {
        const unsigned feature = i / 2 * 4 * kInRegister + lane % 4 * kInRegister + which;
        a[lane / 4 + i % 2 * 8][feature] = value(*of(lane).a[i], which);
        if (i % 2 == 0) b[feature][lane / 4] = value(*of(lane).b[i / 2], which);
      }
    }
  }
  for_sums(kColumns,
           [&](unsigned lane, unsigned i, unsigned row, unsigned column) { c[row][column] = *of(lane).c[i]; });
  add_product(a, b, 8 * kInRegister, kColumns, c);
  for_sums(kColumns,
           [&](unsigned lane, unsigned i, unsigned row, unsigned column) { *of(lane).d[i] = c[row][column]; });
}

// --- wgmma -------------------------------------------------------------------------------------------------------------------

// Of one thread: products that nobody has waited for, and how many there were at each commit.
struct Products {
  std::vector<ptx::Product> begun;
  std::vector<std::size_t> groups;
};
std::array<Products, kMostThreads> products;

// Where an operand lies: rows of 128 bytes in groups of eight, slabs of 64 columns `step` apart.
struct Operand {
  u32 start, step;

  explicit Operand(u64 descriptor)
      : start(static_cast<u32>(descriptor & 0x3fff) * 16), step(static_cast<u32>(descriptor >> 16 & 0x3fff) * 16) {
    constexpr u64 kSwizzle128 = u64{1} << 62, kEightRows = u64{1024 / 16} << 32;
    constexpr u64 kFixed = ~u64{0x3fff} & ~(u64{0x3fff} << 16);
    if ((descriptor & kFixed) != (kSwizzle128 | kEightRows)) fail("an operand with other strides or swizzling");
  }

  /// Eight elements side by side.
  static std::array<u16, 8> eight(u32 address) {
    std::array<u16, 8> values{};
    std::memcpy(values.data(), shared_at(swizzled(address), 16), sizeof(values));
    return values;
  }
};

void load_a(void* const* lanes, const ptx::Product& any, std::size_t nth, Convert convert, float (*a)[kFeatures]) {
  if (any.registers) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const auto& words = static_cast<Products*>(lanes[lane])->begun.at(nth).a_registers;
      for (unsigned i = 0; i < 8; ++i) {
        a[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = half_of(words.at(i / 2), i % 2, convert);
      }
    }
    return;
  }
  const Operand from(any.a);
  const unsigned first = place.thread / kWarp % 4 * kRows;  // of the warpgroup's rows
  if (any.a_by_features) {
    for (unsigned k = 0; k < kFeatures; ++k) {
      for (unsigned row = 0; row < kRows; row += 8) {
        const auto values = Operand::eight(from.start + k / 8 * 1024 + k % 8 * 128 + 2 * (first + row));
        for (unsigned i = 0; i < 8; ++i) a[row + i][k] = convert(values.at(i));
      }
    }
    return;
  }
  for (unsigned row = 0; row < kRows; ++row) {
    for (unsigned k = 0; k < kFeatures; k += 8) {
      const u32 address = from.start + (first + row) / 8 * 1024 + row % 8 * 128 + 2 * k;
      const auto values = Operand::eight(address);
      std::transform(values.begin(), values.end(), a[row] + k, convert);
    }
  }
}

void load_b(const ptx::Product& any, Convert convert, float (*b)[kMostColumns]) {
  const Operand from(any.b);
  const auto columns = static_cast<unsigned>(any.columns);
  if (any.b_by_features) {
    for (unsigned k = 0; k < kFeatures; ++k) {
      for (unsigned n = 0; n < columns; n += 8) {
        const auto values = Operand::eight(from.start + n / 64 * from.step + k / 8 * 1024 + k % 8 * 128 + n % 64 * 2);
        std::transform(values.begin(), values.end(), b[k] + n, convert);
      }
    }
    return;
  }
  for (unsigned n = 0; n < columns; ++n) {
    for (unsigned k = 0; k < kFeatures; k += 8) {
      const auto values = Operand::eight(from.start + n / 8 * 1024 + n % 8 * 128 + 2 * k);
      for (unsigned i = 0; i < 8; ++i) b[k + i][n] = convert(values.at(i));
    }
  }
}

// The rows of one warp.
void warpgroup_product(void* const* lanes, std::size_t nth) {
  const auto of = [&](unsigned lane) -> ptx::Product& { return static_cast<Products*>(lanes[lane])->begun.at(nth); };
  const ptx::Product& any = of(0);
  for (unsigned lane = 1; lane < kWarp; ++lane) {
    const ptx::Product& other = of(lane);
    if (other.a != any.a || other.b != any.b || other.add != any.add || other.columns != any.columns) {
      fail("lanes of a warp differ in the operands of a warpgroup product");
    }
  }
  static float a[kRows][kFeatures], b[kFeatures][kMostColumns], c[kRows][kMostColumns];
  const Convert convert = any.half ? ptx::of_f16 : ptx::of_bf16;
  load_a(lanes, any, nth, convert, a);
  load_b(any, convert, b);
  const auto columns = static_cast<unsigned>(any.columns);
  for_sums(columns, [&](unsigned lane, unsigned i, unsigned row, unsigned column) {
    c[row][column] = any.add ? of(lane).d[i] : 0.0f;
  });
  add_product(a, b, kFeatures, columns, c);
  for_sums(columns, [&](unsigned lane, unsigned i, unsigned row, unsigned column) { of(lane).d[i] = c[row][column]; });
}

struct Wait {
  Products* of;
  std::size_t pending;

  [[nodiscard]] std::size_t finished() const {
    const std::vector<std::size_t>& groups = of->groups;
    return groups.size() <= pending ? 0 : groups.at(groups.size() - pending - 1);
  }
};

void finish(void* const* lanes, unsigned /*mask*/) {
  const std::size_t count = static_cast<Wait*>(lanes[0])->finished();
  std::array<void*, kWarp> of_lanes{};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Wait& wait = *static_cast<Wait*>(lanes[lane]);
    if (wait.finished() != count) fail("lanes of a warp wait for different products");
    of_lanes.at(lane) = wait.of;
  }
  for (std::size_t i = 0; i < count; ++i) warpgroup_product(of_lanes.data(), i);
  for (unsigned lane = 0; lane < kWarp && count > 0; ++lane) {
    const Wait& wait = *static_cast<Wait*>(lanes[lane]);
    auto& [begun, groups] = *wait.of;
    begun.erase(begun.begin(), begun.begin() + static_cast<std::ptrdiff_t>(count));
    groups.erase(groups.begin(), groups.end() - static_cast<std::ptrdiff_t>(wait.pending));
    for (std::size_t& end : groups) end -= count;
  }
}

}  // namespace

void reset_products() {
  for (Products& of_thread : products) of_thread = {};
}

void reset_ptx() {
  reset_copies();
  reset_products();
}

}  // namespace emulation

namespace ptx {

void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(List<float, 4> d, List<u32, 4> a, List<u32, 2> b,
                                                         List<float, 4> c) {
  emulation::WarpProduct mine = {d, c, a, b};
  emulation::meet(mine, emulation::warp_product<emulation::Type::bf16>);
}
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(List<float, 4> d, List<u32, 4> a, List<u32, 2> b,
                                                       List<float, 4> c) {
  emulation::WarpProduct mine = {d, c, a, b};
  emulation::meet(mine, emulation::warp_product<emulation::Type::f16>);
}
void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(List<float, 4> d, List<u32, 4> a, List<u32, 2> b,
                                                        List<float, 4> c) {
  emulation::WarpProduct mine = {d, c, a, b};
  emulation::meet(mine, emulation::warp_product<emulation::Type::tf32>);
}

void begin(const Product& product) { emulation::products.at(emulation::place.thread).begun.push_back(product); }

void wgmma_commit_group_sync_aligned() {
  emulation::Products& mine = emulation::products.at(emulation::place.thread);
  mine.groups.push_back(mine.begun.size());
}

void wgmma_wait_group_sync_aligned(int pending) {
  emulation::Wait mine = {&emulation::products.at(emulation::place.thread), static_cast<std::size_t>(pending)};
  emulation::meet(mine, emulation::finish);
}

}  // namespace ptx
