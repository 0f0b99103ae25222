// The program as a function, on files in memory.
#include "cli/app.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>

#include "bytes.h"
#include "cli/arrays.h"

namespace vicus::cli {
namespace {

using testing::MemoryFiles;
using testing::npy;
using testing::raw;

struct Outcome {
  int code = 0;
  std::string out, err;
};

Outcome run_with(Files& files, std::vector<const char*> arguments) {
  std::ostringstream out, err;
  Context context{out, err, files, false, {}, false};
  arguments.insert(arguments.begin(), "vicus");
  const int code = run(static_cast<int>(arguments.size()), arguments.data(), context);
  return {code, out.str(), err.str()};
}

TEST(App, AttendsInMemory) {
  // One token sees itself only: the output is its value, the logsumexp its own logit.
  MemoryFiles files;
  const std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 1, 2)}";
  files.contents["q.npy"] = npy(header, raw(std::vector<float>{1, 2, 3, 4}));
  const Outcome outcome = run_with(files, {"attend", "-q", "q.npy", "-k", "q.npy", "-v", "q.npy", "--kernel-size", "1",
                                           "--scale", "1", "-o", "o.npy", "--lse", "l.npy"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out + outcome.err, "");
  ArrayReader reader(files, false);
  std::vector<float> output(4), lse(2);
  std::memcpy(output.data(), reader.read("", "o.npy", "").bytes().data(), 16);
  std::memcpy(lse.data(), reader.read("", "l.npy", "").bytes().data(), 8);
  EXPECT_EQ(output, (std::vector<float>{1, 2, 3, 4}));
  EXPECT_EQ(lse, (std::vector<float>{5, 25}));
}

TEST(App, ErrorsAreOneLineWhateverTheNames) {
  MemoryFiles files;
  const Outcome outcome =
      run_with(files, {"attend", "-q", "a\nb\x1b[31m\r.npy", "-k", "k.npy", "-v", "v.npy", "--dense", "-o", "o.npy"});
  EXPECT_EQ(outcome.code, 1);
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1);
  EXPECT_EQ(outcome.err.find('\x1b'), std::string::npos);
  EXPECT_NE(outcome.err.find("--query"), std::string::npos);
}

TEST(App, NoArgumentsIsWrongInput) {
  MemoryFiles files;
  EXPECT_EQ(run_with(files, {}).code, 2);
  std::ostringstream out, err;
  Context context{out, err, files, false, {}, false};
  EXPECT_EQ(run(0, nullptr, context), 2) << "not even the program's name";
}

TEST(App, OutputThatCannotBeWrittenIsAnError) {
  MemoryFiles files;
  std::ostringstream out, err;
  out.setstate(std::ios::badbit);
  Context context{out, err, files, false, {}, false};
  const char* const arguments[] = {"vicus", "info"};
  EXPECT_EQ(run(2, arguments, context), 1);
  EXPECT_NE(err.str().find("standard output"), std::string::npos);
}

}  // namespace
}  // namespace vicus::cli
