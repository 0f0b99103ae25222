#include "cli/problem_json.h"

#include <gtest/gtest.h>

#include <string>

#include "cli/format.h"
#include "cli/plan_json.h"
#include "vicus/error.h"

namespace vicus::cli {
namespace {

/// An object with a good layout and mask, and `fields`.
std::string object(const std::string& fields) {
  std::string text = R"({"layout": [4, 5], "mask": {"kind": "neighborhood", "kernel_size": [3, 2]}, )";
  return text.append(R"("heads": 2, "head_dim": 8, )").append(fields).append(R"("rpb": false})");
}

std::string error_of(const std::string& text) {
  try {
    (void)parse_problems(text, "list.json");
  } catch (const InvalidArgument& error) {
    EXPECT_TRUE(std::string(error.what()).starts_with(error.argument()));
    return error.what();
  } catch (const FormatError& error) {
    return error.what();
  }
  return "no error";
}

TEST(ProblemJson, ReadsWhatPlanPrints) {
  Problem windows;
  windows.dtype = DType::float16;
  windows.batch = 3;
  windows.layout = {7, 8, 9};
  windows.heads = 4;
  windows.heads_kv = 2;
  windows.head_dim = 24;
  windows.head_dim_v = 16;
  windows.scale = 0.0;
  windows.additional_tokens = 5;
  windows.rpb = true;
  windows.mask = Neighborhood{.kernel_size = {3, 4, 5}, .stride = {1, 2, 3}, .dilation = 2, .is_causal = {0, 1, 0}};
  Problem dense;
  dense.batch = 2;
  dense.layout = 6;
  dense.head_dim = 8;
  dense.scale = 0.125;
  dense.attn_bias = true;
  dense.mask =
      Dense{.keys = 9, .causal = Causal::bottom_right, .window_left = 3, .window_right = 0, .key_lengths = {9, 4}};
  Problem packed = dense;
  packed.batch = 1;
  packed.attn_bias = false;
  packed.mask =
      Dense{.keys = 9, .causal = Causal::top_left, .cumulative_queries = {0, 2, 6}, .cumulative_keys = {0, 9, 9}};
  Problem later = packed;
  later.mask = Dense{.keys = 9, .device = {.sequences = 4, .max_queries = 5, .max_keys = 6}};
  Problem padding = dense;
  padding.mask = Dense{.keys = 9, .device = {.key_lengths = true}};
  std::string lines, pretty, array = "[";
  for (const Problem& problem : {windows, dense, packed, later, padding}) {
    const Json json = to_json(validate(problem));
    lines += json.dump() + "\n";
    pretty += Json{{"engine", "cpu"}, {"problem", json}}.dump(2);
    array.append(array.size() > 1 ? "," : "").append(json.dump());
  }
  for (const std::string& text : {lines, pretty, array + "]"}) {
    const auto read = parse_problems(text, "list.json");
    ASSERT_EQ(read.size(), 5U);
    EXPECT_EQ(read[0].problem, validate(windows));
    EXPECT_EQ(read[1].problem, validate(dense));
    EXPECT_EQ(read[2].problem, validate(packed));
    EXPECT_EQ(read[3].problem, validate(later));
    EXPECT_EQ(read[4].problem, validate(padding));
  }
  const auto read = parse_problems(lines + "\n\n" + array + "]", "list.json");
  ASSERT_EQ(read.size(), 10U);
  EXPECT_EQ(read[2].place, "list.json, line 3");
  EXPECT_EQ(read[6].place, "list.json, line 8, problem 2");
}

TEST(ProblemJson, WhatIsLeftOutIsAsInAProblem) {
  const auto read =
      parse_problems(R"({"layout": 9, "head_dim": 4, "mask": {"kind": "neighborhood", "kernel_size": 3}})", "");
  Problem problem;
  problem.layout = 9;
  problem.head_dim = 4;
  problem.mask = Neighborhood{.kernel_size = 3};
  ASSERT_EQ(read.size(), 1U);
  EXPECT_EQ(read[0].problem, validate(problem));
}

TEST(ProblemJson, ErrorsNameLineAndField) {
  const std::pair<std::string, std::string> wrong[] = {
      {object(R"("headds": 1, )"), "list.json, line 1: headds is unknown; allowed: additional_tokens, "},
      {std::string("\n\n").append(object(R"("batch": "2", )")),
       "list.json, line 3: batch is \"2\"; allowed: an integer"},
      {object("").append("\n").append(object(R"("heads_kv": 3, )")), "list.json, line 2: heads_kv is 3"},
      {object(R"("batch": 2.5, )"), "batch is 2.5"},
      {object(R"("batch": 18446744073709551615, )"), "batch is 18446744073709551615"},
      {object(R"("batch": -1, )"), "batch is -1"},
      {object(R"("dtype": "int8", )"), "dtype is 'int8'"},
      {object(R"("dtype": 8, )"), "dtype is '8'"},
      {object(R"("scale": "x", )"), "scale is \"x\"; allowed: a number, or null"},
      {object(R"("attn_bias": 1, )"), "attn_bias is 1; allowed: true or false"},
      {R"({"layout": [1, 2, 3, 4], "mask": {}})", "layout is a list of 4"},
      {R"({"layout": [1, "x"], "mask": {}})", "layout[1] is \"x\""},
      {R"({"layout": {}, "mask": {}})", "layout is an object"},
      {R"({"mask": {"kind": "dense", "keys": 2}})", "layout is missing"},
      {R"({"layout": 2})", "mask is missing"},
      {R"({"layout": 2, "mask": "dense"})", "mask is \"dense\"; allowed: an object"},
      {R"({"layout": 2, "mask": {}})", "mask.kind is missing; allowed: neighborhood, dense"},
      {R"({"layout": 2, "mask": {"kind": "flash"}})", "mask.kind is \"flash\""},
      {R"({"layout": 2, "mask": {"kind": "dense"}})", "mask.keys is missing"},
      {R"({"layout": 2, "mask": {"kind": "dense", "keys": 2, "causal": true}})", "mask.causal is true"},
      {R"({"layout": 2, "mask": {"kind": "dense", "keys": 2, "kernel_size": 2}})", "mask.kernel_size is unknown"},
      {R"({"layout": 2, "mask": {"kind": "dense", "keys": 2, "key_lengths": 2}})", "mask.key_lengths is 2"},
      {R"({"layout": 2, "mask": {"kind": "dense", "keys": 2, "device": 2}})", "mask.device is 2; allowed: an object"},
      {R"({"layout": 2, "mask": {"kind": "dense", "keys": 2, "device": {"max": 2}}})", "mask.device.max is unknown"},
      {R"({"layout": 2, "head_dim": 8, "mask": {"kind": "neighborhood", "kernel_size": 0}})", "kernel_size"},
      {R"({"problem": 3})", "problem is 3"},
      {std::string("[").append(object("")).append(",\n7]"), "list.json, line 1, problem 2: problem is 7"},
      {"12", "problem is 12"},
      {"", "list.json: holds no problem"},
      {" \n ", "list.json: holds no problem"},
      {"[]", "list.json: holds no problem"},
      {object("") + "\n\n{\"layout\": ", "list.json, line 3: no JSON"},
      {object("") + "\nlayout", "list.json, line 2: no JSON"},
      {std::string(100000, '['), "list.json, line 1: no JSON"},
      {"{\"\xff\": 1}", "list.json, line 1: no JSON"},
  };
  for (const auto& [text, naming] : wrong) {
    const std::string said = error_of(text);
    EXPECT_NE(said.find(naming), std::string::npos) << text.substr(0, 200) << "\n" << said;
  }
}

}  // namespace
}  // namespace vicus::cli
