// The disk cache within one process; test_processes.py has more of them, and processes that die.
#include "jit/cache.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/log.h"

namespace vicus::jit {
namespace {

namespace fs = std::filesystem;
using Entry = DiskCache::Entry;

class Cache : public ::testing::Test {
 public:
  Cache() {
    std::string name = (fs::temp_directory_path() / "vicus-cache-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    root = name;
    set_log_sink([this](LogLevel, std::string_view text) { messages.emplace_back(text); }, LogLevel::warning);
  }
  ~Cache() override {
    set_log_sink({});
    fs::remove_all(root);
  }
  Cache(Cache&&) = delete;
  Cache(const Cache&) = delete;
  Cache& operator=(Cache&&) = delete;
  Cache& operator=(const Cache&) = delete;

 protected:
  /// Gets `name`, whose cubin is made from it when it is not there.
  Entry get(DiskCache& cache, const std::string& name = "a") {
    return cache.get(
        name,
        [&] {
          ++builds;
          return Entry{"cubin of " + name, "log of " + name};
        },
        hit);
  }

  [[nodiscard]] fs::path file(const std::string& name = "a") const { return directory() / (name + ".vicus"); }
  [[nodiscard]] fs::path directory() const { return root / "below" / "cache"; }
  [[nodiscard]] int files() const {
    return static_cast<int>(std::distance(fs::directory_iterator(directory()), fs::directory_iterator()));
  }

  static std::string read(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  static void write(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

  fs::path root;
  std::vector<std::string> messages;
  std::atomic<int> builds{0};
  bool hit = false;
};

TEST_F(Cache, MissThenHit) {
  DiskCache cache(directory(), 1 << 20);
  EXPECT_FALSE(cache.find("a"));
  for (int i = 0; i < 3; ++i) {
    const Entry entry = get(cache);
    EXPECT_EQ(hit, i > 0);
    EXPECT_EQ(entry.cubin, "cubin of a");
    EXPECT_EQ(entry.log, "log of a");
  }
  EXPECT_EQ(builds, 1);
  get(cache, "b");
  EXPECT_EQ(builds, 2);
  EXPECT_EQ(files(), 2) << "nothing but the entries stays";
  EXPECT_EQ(cache.usage().entries, 2);
  EXPECT_EQ(cache.usage().bytes, fs::file_size(file("a")) + fs::file_size(file("b")));
  EXPECT_EQ(fs::status(directory()).permissions(), fs::perms::owner_all);
  EXPECT_EQ(messages, std::vector<std::string>());
}

TEST_F(Cache, EmptyAndBinaryContentsComeBack) {
  DiskCache cache(directory(), 1 << 20);
  std::string bytes;
  for (unsigned i = 0; i < 100000; ++i) bytes += static_cast<char>(i * i);
  for (const Entry& entry : {Entry{"", ""}, Entry{bytes, ""}, Entry{"", bytes}, Entry{bytes, bytes}}) {
    const std::string name = std::to_string(entry.cubin.size()) + "-" + std::to_string(entry.log.size());
    for (int i = 0; i < 2; ++i) {
      const Entry got = cache.get(name, [&] { return entry; }, hit);
      EXPECT_EQ(hit, i == 1);
      EXPECT_EQ(got.cubin, entry.cubin);
      EXPECT_EQ(got.log, entry.log);
    }
  }
}

TEST_F(Cache, EveryFlippedBitIsAMissAndTheFileIsMadeAgain) {
  DiskCache cache(directory(), 1 << 20);
  get(cache);
  const std::string good = read(file());
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << bit % 8));
    write(file(), bad);
    EXPECT_FALSE(cache.find("a")) << "bit " << bit;
    EXPECT_FALSE(fs::exists(file())) << "bit " << bit;
  }
  EXPECT_EQ(messages.size(), good.size() * 8);
  EXPECT_NE(messages.at(0).find(file().string()), std::string::npos);
  get(cache);
  EXPECT_FALSE(hit);
  EXPECT_EQ(read(file()), good);
}

TEST_F(Cache, EveryOtherLengthIsAMiss) {
  DiskCache cache(directory(), 1 << 20);
  get(cache);
  const std::string good = read(file());
  for (std::size_t size = 0; size < good.size() + 20; ++size) {
    std::string bad = good;
    bad.resize(size);
    write(file(), bad);
    EXPECT_EQ(cache.find("a").has_value(), size == good.size()) << size;
  }
}

TEST_F(Cache, AnEntryOfAnotherNameIsAMiss) {
  DiskCache cache(directory(), 1 << 20);
  get(cache);
  fs::copy_file(file("a"), file("b"));
  EXPECT_FALSE(cache.find("b"));
  EXPECT_TRUE(cache.find("a"));
  fs::create_directory(file("c"));
  EXPECT_FALSE(cache.find("c"));
}

TEST_F(Cache, LeavesOfAKilledWriterAreOverwrittenOrSweptUp) {
  DiskCache cache(directory(), 1 << 20);
  fs::create_directories(directory());
  for (const char* const name : {"a", "b"}) write(directory() / (std::string(name) + ".vicus.tmp"), "half an en");
  EXPECT_EQ(get(cache).cubin, "cubin of a");
  EXPECT_TRUE(cache.find("a"));
  EXPECT_EQ(files(), 1);
}

TEST_F(Cache, AWriterAtWorkIsLeftAlone) {
  DiskCache cache(directory(), 1 << 20);
  fs::create_directories(directory());
  const fs::path busy = directory() / "b.vicus.tmp";
  const int other = ::open(busy.c_str(), O_RDWR | O_CREAT, 0600);
  ASSERT_EQ(::flock(other, LOCK_EX), 0);
  get(cache);
  EXPECT_TRUE(fs::exists(busy));
  ::close(other);
}

TEST_F(Cache, ThreadsBuildOnce) {
  DiskCache cache(directory(), 1 << 20);
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      bool was_there = false;
      const Entry entry = cache.get(
          "a",
          [&] {
            ++builds;
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            return Entry{"slow", ""};
          },
          was_there);
      right += entry.cubin == "slow";
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(builds, 1);
  EXPECT_EQ(right, 8);
  EXPECT_EQ(files(), 1);
}

TEST_F(Cache, AStuckWriterIsNotWaitedForForever) {
  DiskCache cache(directory(), 1 << 20, std::chrono::milliseconds(20));
  fs::create_directories(directory());
  const int other = ::open((directory() / "a.vicus.tmp").c_str(), O_RDWR | O_CREAT, 0600);
  ASSERT_EQ(::flock(other, LOCK_EX), 0);
  EXPECT_EQ(get(cache).cubin, "cubin of a");
  EXPECT_FALSE(hit);
  EXPECT_FALSE(fs::exists(file()));
  EXPECT_EQ(messages.size(), 1U);
  ::close(other);
  get(cache);
  EXPECT_TRUE(fs::exists(file()));
}

TEST_F(Cache, AFailedBuildLeavesNothing) {
  DiskCache cache(directory(), 1 << 20);
  const auto fail = [&]() -> Entry { throw std::runtime_error("does not compile"); };
  EXPECT_THROW(static_cast<void>(cache.get("a", fail, hit)), std::runtime_error);
  EXPECT_EQ(files(), 0);
  EXPECT_EQ(get(cache).cubin, "cubin of a");
}

TEST_F(Cache, AnUnwritableDirectoryIsOneWarning) {
  write(root / "below", "a file where a directory should be");
  DiskCache cache(directory(), 1 << 20);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(get(cache).cubin, "cubin of a");
    EXPECT_FALSE(hit);
  }
  ASSERT_EQ(messages.size(), 1U);
  EXPECT_NE(messages[0].find(directory().string()), std::string::npos) << messages[0];
  EXPECT_NE(messages[0].find("Not a directory"), std::string::npos) << messages[0];
}

TEST_F(Cache, NoDirectoryAtAllIsOneWarning) {
  DiskCache cache("", 1 << 20);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(get(cache).cubin, "cubin of a");
  EXPECT_EQ(builds, 2);
  EXPECT_EQ(messages.size(), 1U);
  EXPECT_EQ(cache.usage().entries, 0);
}

TEST_F(Cache, WhatWasNotUsedForLongestGoes) {
  DiskCache unlimited(directory(), 1 << 20);
  for (const char* const name : {"a", "b", "c"}) get(unlimited, name);
  const auto now = fs::file_time_type::clock::now();
  fs::last_write_time(file("a"), now - std::chrono::hours(3));
  fs::last_write_time(file("b"), now - std::chrono::hours(2));
  fs::last_write_time(file("c"), now - std::chrono::hours(1));
  write(directory() / "other people's file", std::string(10000, 'x'));

  DiskCache cache(directory(), 3 * fs::file_size(file("a")));
  EXPECT_TRUE(cache.find("a")) << "used now";
  get(cache, "d");
  EXPECT_TRUE(fs::exists(file("a")));
  EXPECT_FALSE(fs::exists(file("b")));
  EXPECT_TRUE(fs::exists(file("c")));
  EXPECT_TRUE(fs::exists(file("d")));
  EXPECT_TRUE(fs::exists(directory() / "other people's file"));
  EXPECT_LE(cache.usage().bytes, cache.limit_bytes());
}

TEST_F(Cache, ALimitOfZeroStoresNothingAndReadsWhatIsThere) {
  DiskCache unlimited(directory(), 1 << 20), none(directory(), 0);
  get(unlimited, "a");
  get(none, "a");
  EXPECT_TRUE(hit);
  get(none, "b");
  EXPECT_EQ(files(), 1);
}

}  // namespace
}  // namespace vicus::jit
