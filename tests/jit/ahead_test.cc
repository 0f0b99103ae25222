// Compilations in the background.
#include "jit/ahead.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace vicus::jit {
namespace {

constexpr Arch kArch = {9, 0};

/// No test has the text of another.
Source source(int number, const std::string& more = "") {
  return {.file = "",
          .prologue = "constexpr int kAhead = " + std::to_string(number) + ";\n" + more +
                      "extern \"C\" __global__ void attend(Args args) {}"};
}

int compilations() {
  std::ifstream in(std::getenv("FAKE_NVRTC_LOG"));
  int lines = 0;
  for (std::string line; std::getline(in, line);) ++lines;
  return lines;
}

/// Whether `count` compilations have begun, after some time at most.
bool begun(int count) {
  for (int i = 0; i < 2000 && compilations() < count; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  return compilations() == count;
}

bool from_cache(const Source& source) {
  CompileReport report;
  static_cast<void>(cubin(source, kArch, &report));
  return report.from_cache;
}

class AheadTest : public ::testing::Test {
 protected:
  void TearDown() override { ::unsetenv("FAKE_NVRTC_SLEEP"); }
  static void slow(const char* milliseconds) { ::setenv("FAKE_NVRTC_SLEEP", milliseconds, 1); }
  const int before = compilations();
};

TEST_F(AheadTest, WhatIsCompiledAheadIsFoundOrWaitedFor) {
  slow("50");
  Ahead ahead;
  ahead.add({source(1), source(2)}, kArch);
  ASSERT_TRUE(begun(before + 2));
  EXPECT_TRUE(from_cache(source(1)));
  EXPECT_TRUE(from_cache(source(2)));
  EXPECT_EQ(compilations() - before, 2);
}

TEST_F(AheadTest, MoreIsCompiledAfterAPause) {
  Ahead ahead;
  for (int i = 0; i < 5; ++i) {
    ahead.add({source(10 + i)}, kArch);
    ASSERT_TRUE(begun(before + i + 1));
    EXPECT_TRUE(from_cache(source(10 + i)));
  }
}

TEST_F(AheadTest, WhatDoesNotCompileHarmsNothing) {
  Ahead ahead;
  ahead.add({source(20, "#error\n")}, kArch);
  ahead.add({source(21)}, kArch);
  ASSERT_TRUE(begun(before + 2));
  EXPECT_TRUE(from_cache(source(21)));
}

TEST_F(AheadTest, TheEndWaitsForWhatHasBegunAndForgetsTheRest) {
  slow("50");
  Ahead ahead;
  for (int i = 0; i < 20; ++i) ahead.add({source(30 + i)}, kArch);
  ASSERT_TRUE(begun(before + 1));
  ahead.end();
  const int after = compilations();
  EXPECT_LT(after - before, 20);
  ahead.add({source(50)}, kArch);
  EXPECT_FALSE(from_cache(source(50)));
  EXPECT_EQ(compilations(), after + 1);
}

TEST_F(AheadTest, NoMoreWaitThanAreAllowed) {
  slow("100");
  Ahead ahead(1);
  ahead.add({source(60)}, kArch);
  ASSERT_TRUE(begun(before + 1));
  for (int i = 1; i < 4; ++i) ahead.add({source(60 + i)}, kArch);
  EXPECT_TRUE(begun(before + 2));
  EXPECT_TRUE(from_cache(source(61)));
  EXPECT_FALSE(from_cache(source(62)));
}

TEST_F(AheadTest, AChildOfForkHasNoneOfIt) {
  slow("200");
  Ahead ahead;
  ahead.add({source(70)}, kArch);
  ASSERT_TRUE(begun(before + 1));
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);  // it must not wait for ever
    ahead.add({source(71)}, kArch);
    ahead.end();
    ::pause();  // the file that the thread had open stays open here
    ::_exit(0);
  }
  ASSERT_GT(child, 0);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_TRUE(from_cache(source(70)));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

}  // namespace
}  // namespace vicus::jit
