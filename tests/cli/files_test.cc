#include "cli/files.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "bytes.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

namespace fs = std::filesystem;
using testing::Bytes;
using testing::to_bytes;

class FilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    directory_ = fs::temp_directory_path() / ("vicus-" + std::to_string(::getpid()) + "-" + test->name());
    fs::create_directories(directory_);
  }
  void TearDown() override { fs::remove_all(directory_); }

  [[nodiscard]] std::string path(const std::string& name) const { return (directory_ / name).string(); }
  [[nodiscard]] std::string text(const std::string& name) const {
    std::ifstream file(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  [[nodiscard]] auto entries() const {
    return std::distance(fs::directory_iterator(directory_), fs::directory_iterator());
  }

  fs::path directory_;
  DiskFiles files_;
};

TEST_F(FilesTest, WritesPiecesAndReadsThemBack) {
  const Bytes a = to_bytes("head"), b = to_bytes("body");
  const std::vector<OutputBytes> outputs = {{"--output", path("x"), {a, b}}, {"--lse", path("y"), {}}};
  files_.write(outputs);
  EXPECT_EQ(text("x"), "headbody");
  EXPECT_EQ(text("y"), "");
  EXPECT_EQ(files_.read("--query", path("x")), to_bytes("headbody"));
  EXPECT_EQ(entries(), 2) << "no temporary file stays";
}

TEST_F(FilesTest, UncommittedFileLeavesTheOldOne) {
  std::ofstream(path("x")) << "old";
  {
    OutputFile file("--output", path("x"));
    file.append(to_bytes("new"));
    EXPECT_EQ(entries(), 2);
    EXPECT_EQ(fs::path(file.temporary()).parent_path(), directory_) << "a rename must not cross file systems";
  }
  EXPECT_EQ(text("x"), "old");
  EXPECT_EQ(entries(), 1);
}

TEST_F(FilesTest, SecondOutputFailingKeepsTheFirstAway) {
  const Bytes a = to_bytes("a");
  fs::create_directory(path("d"));
  const std::vector<OutputBytes> outputs = {{"--output", path("x"), {a}}, {"--lse", path("d"), {a}}};
  EXPECT_THROW(files_.write(outputs), InvalidArgument);
  EXPECT_EQ(entries(), 1) << "the directory only";
}

TEST_F(FilesTest, OutputsThatAreNoFilesAreRefused) {
  EXPECT_THROW(files_.check_output("--output", directory_.string()), InvalidArgument);
  EXPECT_THROW(files_.check_output("--output", "/dev/null"), InvalidArgument) << "the rename would replace the device";
  EXPECT_THROW(files_.check_output("--output", ""), InvalidArgument);
  EXPECT_THROW(files_.check_output("--output", path("x/")), InvalidArgument);
  EXPECT_THROW(files_.check_output("--output", path("missing/x")), IoError);
  std::ofstream(path("file")) << "";
  EXPECT_THROW(files_.check_output("--output", path("file/x")), IoError);
  EXPECT_NO_THROW(files_.check_output("--output", path("file")));
  EXPECT_NO_THROW(files_.check_output("--output", path("new")));
}

TEST_F(FilesTest, InputsThatAreNoFilesAreRefused) {
  EXPECT_THROW(files_.read("--query", directory_.string()), InvalidArgument);
  EXPECT_THROW(files_.read("--query", "/dev/zero"), InvalidArgument) << "it never ends";
  EXPECT_THROW(files_.read("--query", path("missing")), IoError);
}

}  // namespace
}  // namespace vicus::cli
