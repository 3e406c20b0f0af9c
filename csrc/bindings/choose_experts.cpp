// Torch side of choose_experts and its backward: check, call.
#include "choose_experts.h"

#include "tensor.h"

namespace ep {
namespace {

Score score_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 3, "choose_experts: score must be in 0..3, got ", number);
  return static_cast<Score>(number);
}

Rule rule_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 4, "choose_experts: rule must be in 0..4, got ", number);
  return static_cast<Rule>(number);
}

void check_sizes(const ChooseExpertsArgs& args) {
  STD_TORCH_CHECK(args.num_experts >= 1 && args.num_experts <= kMaxExperts,
                  "choose_experts: there must be 1..",
                  kMaxExperts,
                  " experts, got ",
                  args.num_experts);
  STD_TORCH_CHECK(args.top_k >= 1 && args.top_k <= args.num_experts && args.top_k <= kMaxChoices,
                  "choose_experts: top_k must be in 1..min(",
                  kMaxChoices,
                  ", experts), got ",
                  args.top_k);
  const bool grouped = args.rule == Rule::kGroupLimited || args.rule == Rule::kC2RGrouped;
  STD_TORCH_CHECK(!grouped || (args.num_groups >= 1 && args.num_groups <= args.num_experts &&
                               args.max_groups >= 1 && args.max_groups <= args.num_groups),
                  "choose_experts: max_groups must be in 1..num_groups and num_groups in 1..experts");
  STD_TORCH_CHECK(args.rule != Rule::kGroupLimited ||
                      (args.num_experts % args.num_groups == 0 &&
                       args.num_experts / args.num_groups * args.max_groups >= args.top_k),
                  "choose_experts: num_groups must divide the experts, and max_groups of them hold top_k");
  const bool listed = args.rule == Rule::kC2R || args.rule == Rule::kC2RGrouped;
  STD_TORCH_CHECK(
      !listed || ((args.lists != nullptr || args.num_experts == 1) && args.top_t >= args.top_k - 1 &&
                  args.top_t <= args.list_length && args.list_length < args.num_experts),
      "choose_experts: C2R needs lists of top_t..experts-1 entries and top_t >= top_k - 1");
  STD_TORCH_CHECK(args.rule != Rule::kC2RGrouped ||
                      (args.group_of != nullptr && args.list_length == args.num_experts - 1),
                  "choose_experts: C2R in groups needs group_of and lists of all other experts");
}

void choose_experts(const Tensor& logits,
                    const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& lists,
                    const std::optional<Tensor>& group_of,
                    int64_t rule,
                    int64_t top_t,
                    int64_t num_groups,
                    int64_t max_groups,
                    int64_t group_top,
                    int64_t score,
                    bool renormalise,
                    double scale,
                    const Tensor& ids,
                    const Tensor& weights) {
  STD_TORCH_CHECK(logits.dim() == 2 && ids.dim() == 2, "choose_experts: logits and ids must be matrices");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), top_k = ids.size(1);
  const ChooseExpertsArgs args{
      .logits = data<float>(logits, "logits", num_tokens * num_experts, logits),
      .bias = bias ? data<float>(*bias, "bias", num_experts, logits) : nullptr,
      .lists = lists ? data<int32_t>(*lists, "lists", lists->numel(), logits) : nullptr,
      .group_of = group_of ? data<int32_t>(*group_of, "group_of", num_experts, logits) : nullptr,
      .num_tokens = num_tokens,
      .num_experts = num_experts,
      .top_k = top_k,
      .list_length = lists ? lists->size(1) : 0,
      .top_t = top_t,
      .num_groups = num_groups,
      .max_groups = max_groups,
      .group_top = group_top,
      .rule = rule_of(rule),
      .score = score_of(score),
      .renormalise = renormalise,
      .scale = static_cast<float>(scale),
      .ids = data<int64_t>(ids, "ids", num_tokens * top_k, logits),
      .weights = data<float>(weights, "weights", num_tokens * top_k, logits)};
  check_sizes(args);
  STD_TORCH_CHECK(!lists || lists->size(0) == num_experts,
                  "choose_experts: lists must have a row per expert");
  EP_RETURN_IF_CUDA(logits, choose_experts_cuda, args)
  in_parallel(
      num_tokens, num_experts * 8, [&](int64_t begin, int64_t end) { choose_experts_cpu(args, begin, end); });
}

void choose_experts_backward(const Tensor& grad_weights,
                             const Tensor& logits,
                             const Tensor& ids,
                             int64_t score,
                             bool renormalise,
                             double scale,
                             const Tensor& grad_logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && ids.dim() == 2,
                  "choose_experts_backward: logits and ids are matrices");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), top_k = ids.size(1);
  STD_TORCH_CHECK(top_k <= kMaxChoices, "choose_experts_backward: top_k must be in 1..", kMaxChoices);
  const ChooseExpertsBackwardArgs args{
      .grad_weights = data<float>(grad_weights, "grad_weights", num_tokens * top_k, logits),
      .logits = data<float>(logits, "logits", num_tokens * num_experts, logits),
      .ids = data<int64_t>(ids, "ids", num_tokens * top_k, logits),
      .num_tokens = num_tokens,
      .num_experts = num_experts,
      .top_k = top_k,
      .score = score_of(score),
      .renormalise = renormalise,
      .scale = static_cast<float>(scale),
      .grad_logits = data<float>(grad_logits, "grad_logits", num_tokens * num_experts, logits)};
  EP_RETURN_IF_CUDA(logits, choose_experts_backward_cuda, args)
  in_parallel(num_tokens, num_experts * 8, [&](int64_t begin, int64_t end) {
    choose_experts_backward_cpu(args, begin, end);
  });
}

}  // namespace

EP_REGISTER({
  m.impl("choose_experts", TORCH_BOX(&choose_experts));
  m.impl("choose_experts_backward", TORCH_BOX(&choose_experts_backward));
})

}  // namespace ep
