// The examples of FIPS 180 and their authors, and messages added in pieces.
#include "jit/sha256.h"

#include <gtest/gtest.h>

namespace vicus::jit {
namespace {

std::string sha256(std::string_view text) {
  Sha256 sum;
  sum.add(text);
  return hex(sum.finish());
}

TEST(Sha256, PublishedExamples) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(
      sha256("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnop"
             "qrstnopqrstu"),
      "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
  EXPECT_EQ(sha256(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, PiecesMakeTheSameMessage) {
  std::string text;
  for (int i = 0; i < 200; ++i) text += static_cast<char>(i * 37);
  for (std::size_t size = 0; size <= text.size(); ++size) {
    const std::string_view message = std::string_view(text).substr(0, size);
    const std::string whole = sha256(message);
    for (std::size_t cut = 0; cut <= size; cut += 7) {
      Sha256 sum;
      sum.add(message.substr(0, cut));
      sum.add(message.substr(cut));
      ASSERT_EQ(hex(sum.finish()), whole) << size << " cut at " << cut;
    }
  }
}

TEST(Sha256, SizedTextsDoNotRunIntoEachOther) {
  Sha256 a, b;
  a.add_sized("ab");
  a.add_sized("c");
  b.add_sized("a");
  b.add_sized("bc");
  EXPECT_NE(hex(a.finish()), hex(b.finish()));
}

}  // namespace
}  // namespace vicus::jit
