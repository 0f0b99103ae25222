// The text inside the library is the text of the files, and each program gets the files it includes.
#include "jit/source.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

namespace vicus::jit {
namespace {

namespace fs = std::filesystem;
const fs::path kRoot = VICUS_SOURCE_DIR;

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::set<std::string> names(const std::string& text) {
  std::set<std::string> all;
  for (const EmbeddedFile& file : headers_of(text)) all.insert(file.name);
  return all;
}

TEST(Embedded, EveryDeviceFileIsInTheLibraryWordForWord) {
  std::set<std::string> embedded;
  for (const EmbeddedFile& file : embedded_files()) {
    embedded.insert(file.name);
    const bool header = std::string_view(file.name).starts_with("vicus/");
    EXPECT_TRUE(file.text == contents(kRoot / (header ? "include" : "src/gpu") / file.name))
        << file.name << " in the library is not the file: build again";
  }
  std::set<std::string> expected = {"vicus/geometry.h"};
  std::error_code none;
  for (const auto& file : fs::directory_iterator(kRoot / "src/gpu", none)) {
    const std::string name = file.path().filename(), extension = file.path().extension();
    if (extension == ".cu" || extension == ".cuh" || name.ends_with("args.h")) expected.insert(name);
  }
  EXPECT_EQ(embedded, expected);
}

TEST(Source, TextIsThePrologueThenTheFile) {
  EXPECT_EQ(text_of({.file = "forward.cu", .prologue = "constexpr int kHeadDim = 64;"}),
            "constexpr int kHeadDim = 64;\n#include \"forward.cu\"\n");
  EXPECT_EQ(text_of({.file = "forward.cu"}), "#include \"forward.cu\"\n");
  EXPECT_EQ(text_of({.prologue = "int a;\n"}), "int a;\n");
}

TEST(Source, IncludesAreFoundHoweverTheyAreSpelled) {
  const std::set<std::string> geometry = {"vicus/geometry.h"};
  EXPECT_EQ(names("int a;\n#include \"vicus/geometry.h\"\nint b;"), geometry);
  EXPECT_EQ(names("\t #\tinclude \t\"vicus/geometry.h\" // why"), geometry);
  EXPECT_EQ(names("#include\"vicus/geometry.h\""), geometry);
  EXPECT_EQ(names("#include \"vicus/geometry.h\"\n#include \"vicus/geometry.h\"\n"), geometry);
  for (const char* const none : {"", "#include <vicus/geometry.h>", "// \"vicus/geometry.h\"", "#include", "#",
                                 "#define A \"vicus/geometry.h\"", "#include \"other.h\""}) {
    EXPECT_EQ(names(none), std::set<std::string>()) << none;
  }
}

TEST(Source, IncludesOfIncludesAreFound) {
  for (const EmbeddedFile& file : embedded_files()) {
    const std::set<std::string> all = names("#include \"" + std::string(file.name) + "\"");
    EXPECT_TRUE(all.contains(file.name));
    for (const std::string& included : names(file.text)) EXPECT_TRUE(all.contains(included)) << file.name;
  }
}

}  // namespace
}  // namespace vicus::jit
