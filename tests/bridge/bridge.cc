// One C function over the whole C++ API, for tests in another language. A request is JSON, arrays are described beside
// it, the answer is JSON: {"result": ...} or {"error": {"class": ..., "argument": ..., "text": ...}}. Nothing is checked
// here that the library checks.
#include <cstdlib>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "json_problem.h"

#if defined(__has_feature)
#define VICUS_HAS_FEATURE(x) __has_feature(x)
#else
#define VICUS_HAS_FEATURE(x) 0
#endif

namespace vicus::bridge {
namespace {

// The arrays of one call by name; absent ones are absent views.
class Arrays {
 public:
  explicit Arrays(std::span<const VicusBridgeTensor> tensors) {
    for (const VicusBridgeTensor& tensor : tensors) views_.emplace(tensor.name, view_of(tensor));
  }
  TensorView operator[](const std::string& name) const {
    const auto found = views_.find(name);
    return found == views_.end() ? TensorView() : found->second;
  }
  /// name0, name1, ... up to `count`.
  template <class View>
  std::vector<View> list(const std::string& name, int count) const {
    std::vector<View> views;
    for (int i = 0; i < count; ++i) views.push_back((*this)[name + std::to_string(i)]);
    return views;
  }

 private:
  std::map<std::string, TensorView> views_;
};

AttentionInputs inputs_of(const Arrays& a) {
  return {a["query"], a["key"], a["value"], a["additional_keys"], a["additional_values"], a["rpb"], a["attn_bias"]};
}

Plan plan_of(const Json& request) {
  return choose_plan(problem_from(request.at("problem")), options_from(request.value("options", Json::object())));
}

std::optional<double> scale_of(const Json& request) {
  return request.contains("scale") ? std::optional(request["scale"].get<double>()) : std::nullopt;
}

Engine engine_of(const Json& request) {
  return request.contains("engine") ? parse_engine(request["engine"].get<std::string>()) : Engine::automatic;
}

Json run_forward(const Json& request, const Arrays& a) {
  forward(plan_of(request), inputs_of(a), a["output"], a["logsumexp"]);
  return {};
}

Json run_backward(const Json& request, const Arrays& a) {
  backward(plan_of(request), inputs_of(a), {a["output"], a["logsumexp"], a["grad_output"], a["grad_logsumexp"]},
           {a["d_query"], a["d_key"], a["d_value"], a["d_additional_keys"], a["d_additional_values"], a["d_rpb"]});
  return {};
}

Json run_qk_forward(const Json& request, const Arrays& a) {
  qk_forward(neighborhood_from(request.at("mask")), a["query"], a["key"], a["scores"], a["additional_keys"], a["rpb"],
             engine_of(request));
  return {};
}

Json run_qk_backward(const Json& request, const Arrays& a) {
  qk_backward(neighborhood_from(request.at("mask")), a["query"], a["key"], a["grad_scores"],
              {a["d_query"], a["d_key"], a["d_additional_keys"], a["d_rpb"]}, a["additional_keys"], engine_of(request));
  return {};
}

Json run_av_forward(const Json& request, const Arrays& a) {
  av_forward(neighborhood_from(request.at("mask")), a["scores"], a["value"], a["output"], a["additional_values"],
             engine_of(request));
  return {};
}

Json run_av_backward(const Json& request, const Arrays& a) {
  av_backward(neighborhood_from(request.at("mask")), a["scores"], a["value"], a["grad_output"],
              {a["d_scores"], a["d_value"], a["d_additional_values"]}, a["additional_values"], engine_of(request));
  return {};
}

Json run_merge_forward(const Json& request, const Arrays& a) {
  const int parts = request.at("parts");
  merge_forward(a.list<ConstTensorView>("output", parts), a.list<ConstTensorView>("logsumexp", parts), a["output"],
                a["logsumexp"], engine_of(request));
  return {};
}

Json run_merge_backward(const Json& request, const Arrays& a) {
  const int parts = request.at("parts");
  // The caller may leave out either list of gradients, or single members of it.
  const int outputs = request.value("grad_outputs", parts), logsumexps = request.value("grad_logsumexps", parts);
  merge_backward(a.list<ConstTensorView>("output", parts), a.list<ConstTensorView>("logsumexp", parts),
                 a["grad_output"], a["grad_logsumexp"], a.list<TensorView>("d_output", outputs),
                 a.list<TensorView>("d_logsumexp", logsumexps), engine_of(request));
  return {};
}

Json run_neighborhood_attention(const Json& request, const Arrays& a) {
  neighborhood_attention(a["query"], a["key"], a["value"], a["output"], neighborhood_from(request.at("mask")),
                         scale_of(request), a["logsumexp"]);
  return {};
}

Json run_attention(const Json& request, const Arrays& a) {
  attention(a["query"], a["key"], a["value"], a["output"], dense_from(request.at("mask")), scale_of(request),
            a["logsumexp"]);
  return {};
}

// The problem of the arrays at hand.
Json run_infer(const Json& request, const Arrays& a) {
  if (request.contains("neighborhood")) {
    return to_json(neighborhood_problem(a["query"], a["key"], a["value"], neighborhood_from(request["neighborhood"]),
                                        scale_of(request), a["additional_keys"], a["rpb"]));
  }
  return to_json(dense_problem(a["query"], a["key"], a["value"], dense_from(request.at("dense")), scale_of(request),
                               a["additional_keys"], a["attn_bias"]));
}

Json run_info(const Json& /*request*/, const Arrays& /*arrays*/) {
  std::string sanitizer;
#if defined(__SANITIZE_ADDRESS__) || VICUS_HAS_FEATURE(address_sanitizer)
  sanitizer = "address";
#elif defined(__SANITIZE_THREAD__) || VICUS_HAS_FEATURE(thread_sanitizer)
  sanitizer = "thread";
#endif
  return {{"version", version()},
          {"targets_built", cpu_targets_built()},
          {"targets", cpu_targets_available()},
          {"threads", default_threads()},
          {"sanitizer", sanitizer}};
}

using Operation = Json (*)(const Json&, const Arrays&);

const std::map<std::string, Operation>& operations() {
  static const std::map<std::string, Operation> table = {
      {"forward", run_forward},
      {"backward", run_backward},
      {"qk_forward", run_qk_forward},
      {"qk_backward", run_qk_backward},
      {"av_forward", run_av_forward},
      {"av_backward", run_av_backward},
      {"merge_forward", run_merge_forward},
      {"merge_backward", run_merge_backward},
      {"neighborhood_attention", run_neighborhood_attention},
      {"attention", run_attention},
      {"infer", run_infer},
      {"info", run_info},
      {"plan", [](const Json& request, const Arrays&) { return to_json(plan_of(request)); }},
      {"validate",
       [](const Json& request, const Arrays&) { return to_json(validate(problem_from(request.at("problem")))); }},
      {"supports",
       [](const Json& request, const Arrays&) {
         const Problem problem = validate(problem_from(request.at("problem")));
         return Json(supports(problem, parse_engine(request.at("engine").get<std::string>())));
       }},
      {"score_slots", [](const Json& request,
                         const Arrays&) { return Json(score_slots(validate(problem_from(request.at("problem"))))); }},
      {"limit_cpu_target",
       [](const Json& request, const Arrays&) {
         limit_cpu_target(request.at("name").get<std::string>());
         return Json();
       }},
  };
  return table;
}

Json error(const char* name, const std::string& argument, const std::string& text) {
  return {{"error", {{"class", name}, {"argument", argument}, {"text", text}}}};
}

Json call(const char* operation, const char* request, std::span<const VicusBridgeTensor> tensors) {
  try {
    const Operation run = operations().at(operation);
    return {{"result", run(Json::parse(request), Arrays(tensors))}};
  } catch (const InvalidArgument& e) {
    return error("InvalidArgument", e.argument(), e.what());
  } catch (const Unsupported& e) {
    return error("Unsupported", "", e.what());
  } catch (const std::exception& e) {
    return error("exception", "", e.what());
  }
}

}  // namespace
}  // namespace vicus::bridge

#define VICUS_BRIDGE_EXPORT __attribute__((visibility("default")))

extern "C" {

/// The answer; the caller frees it with vicus_bridge_free. Never throws.
VICUS_BRIDGE_EXPORT char* vicus_bridge_call(const char* operation, const char* request,
                                            const VicusBridgeTensor* tensors, std::int32_t count) {
  const std::string answer = vicus::bridge::call(operation, request, {tensors, static_cast<std::size_t>(count)}).dump();
  char* text = static_cast<char*>(std::malloc(answer.size() + 1));
  if (text != nullptr) std::memcpy(text, answer.c_str(), answer.size() + 1);
  return text;
}

VICUS_BRIDGE_EXPORT void vicus_bridge_free(char* answer) { std::free(answer); }
}
