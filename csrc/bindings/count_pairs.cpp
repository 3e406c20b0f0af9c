// Torch side of count_pairs: check, call.
#include "count_pairs.h"

#include "tensor.h"

namespace ep {
namespace {

void count_pairs(const Tensor& expert_ids, const Tensor& counts) {
  STD_TORCH_CHECK(expert_ids.dim() == 2 && counts.dim() == 2,
                  "count_pairs: expert_ids and counts must be matrices");
  const int64_t num_tokens = expert_ids.size(0), top_k = expert_ids.size(1), num_experts = counts.size(0);
  const CountPairsArgs args{
      .expert_ids = data<int64_t>(expert_ids, "expert_ids", num_tokens * top_k, expert_ids),
      .num_tokens = num_tokens,
      .top_k = top_k,
      .num_experts = num_experts,
      .counts = data<int64_t>(counts, "counts", num_experts * num_experts, expert_ids)};
  EP_RETURN_IF_CUDA(expert_ids, count_pairs_cuda, args)
  count_pairs_cpu(args);
}

}  // namespace

EP_REGISTER({ m.impl("count_pairs", TORCH_BOX(&count_pairs)); })

}  // namespace ep
