// choose_experts: logits -> scores -> a selection rule -> K expert ids and their combine weights, per token.
// choose_experts_backward: gradients of the weights -> gradients of the logits. The choice has none.
//
// Scores. kSoftmax: over all experts. kSoftmaxOfChosen: over the K chosen. kSigmoid: of each. kLogit: the
// logits themselves. `renormalise` divides the K weights by their sum, not those of kLogit, which may be 0;
// `scale` multiplies them.
//
// Selection goes by the logits, or by scores + bias where there is a bias or groups are scored by two
// experts. Of equals the lower id wins. A NaN is never preferred; ids are distinct and in range whatever the
// logits are.
//
//   kTopK          the K best.
//   kGroupLimited  the best `max_groups` of `num_groups` runs of E / num_groups ids, a group scored by the
//   sum
//                  of its `group_top` best (arXiv:2405.04434 3.2.2: 1; arXiv:2412.19437 2.1.2: 2); the K best
//                  of their experts.
//   kC2R           the best expert i, then the K - 1 best of lists[i][:top_t] (arXiv:2504.01337).
//   kC2RGrouped    the best expert i; the devices of the first `max_groups` distinct ones met in score order;
//                  then the K - 1 best of those experts of lists[i][:top_t] that live there, the list being
//                  followed further inside these devices if fewer than K - 1 remain.
//   kGiven         ids are input; only the weights are computed.
#pragma once

#include <cstdint>

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxChoices = 32;

enum class Score { kSoftmax, kSoftmaxOfChosen, kSigmoid, kLogit };
enum class Rule { kTopK, kGroupLimited, kC2R, kC2RGrouped, kGiven };

struct ChooseExpertsArgs {
  const float* logits;      // [num_tokens, num_experts]
  const float* bias;        // [num_experts], added to the scores for the selection alone, or null
  const int32_t* lists;     // [num_experts, list_length], of kC2R*; row i never names i
  const int32_t* group_of;  // [num_experts], in [0, num_groups): devices, of kC2RGrouped
  int64_t num_tokens;       // may be 0
  int64_t num_experts;      // in [1, kMaxExperts]
  int64_t top_k;            // in [1, min(kMaxChoices, num_experts)]
  int64_t list_length;      // kC2R: >= top_t; kC2RGrouped: num_experts - 1
  int64_t top_t;            // in [top_k - 1, num_experts - 1]
  int64_t num_groups;       // in [1, num_experts]
  int64_t max_groups;       // in [1, num_groups]; any max_groups groups hold at least top_k experts
  int64_t group_top;        // 1 or 2
  Rule rule;
  Score score;
  bool renormalise;  // false of kLogit
  float scale;
  int64_t* ids;    // [num_tokens, top_k]; the best first
  float* weights;  // [num_tokens, top_k]
};

struct ChooseExpertsBackwardArgs {
  const float* grad_weights;  // [num_tokens, top_k]
  const float* logits;        // [num_tokens, num_experts]
  const int64_t* ids;         // [num_tokens, top_k]
  int64_t num_tokens;         // may be 0
  int64_t num_experts;
  int64_t top_k;
  Score score;
  bool renormalise;
  float scale;
  float* grad_logits;  // [num_tokens, num_experts]
};

// Tokens [begin, end); ranges are independent of each other.
void choose_experts_cpu(const ChooseExpertsArgs& args, int64_t begin, int64_t end);
void choose_experts_backward_cpu(const ChooseExpertsBackwardArgs& args, int64_t begin, int64_t end);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Return the launch status; never print, never exit.
cudaError_t choose_experts_cuda(const ChooseExpertsArgs& args, cudaStream_t stream);
cudaError_t choose_experts_backward_cuda(const ChooseExpertsBackwardArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
