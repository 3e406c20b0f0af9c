#include <algorithm>
#include <vector>

#include "choose_experts.h"
#include "exp.h"
#include "vectorise.h"

namespace ep {
namespace {

constexpr float kTiny = 1e-20f;

// w_j = scale q_j with q a softmax over the chosen: dz_j = scale q_j (g_j - sum over i of g_i q_i).
void through_chosen(const ChooseExpertsBackwardArgs& args,
                    const float* z,
                    const int64_t* ids,
                    const float* grad,
                    float* out) {
  float q[kMaxChoices], largest = z[ids[0]], sum = 0.0f, mean = 0.0f;
  for (int64_t k = 1; k < args.top_k; ++k) largest = std::max(largest, z[ids[k]]);
  for (int64_t k = 0; k < args.top_k; ++k) sum += q[k] = exp_of(z[ids[k]] - largest);
  for (int64_t k = 0; k < args.top_k; ++k) mean += grad[k] * (q[k] /= sum);
  for (int64_t k = 0; k < args.top_k; ++k) out[ids[k]] = args.scale * q[k] * (grad[k] - mean);
}

// w_j = scale p_j with p a softmax over all: dz_e = scale p_e (g_e - sum over j of g_j p_j), g_e = 0 if not
// chosen.
void through_all(const ChooseExpertsBackwardArgs& args,
                 const float* z,
                 const int64_t* ids,
                 const float* grad,
                 float* out) {
  const int64_t num = args.num_experts;
  const float largest = *std::max_element(z, z + num);
  float sum = 0.0f, mean = 0.0f;
  for (int64_t e = 0; e < num; ++e) out[e] = exp_of(z[e] - largest);
  for (int64_t e = 0; e < num; ++e) sum += out[e];
  for (int64_t k = 0; k < args.top_k; ++k) mean += grad[k] * (out[ids[k]] / sum);
  float chosen[kMaxChoices];
  for (int64_t k = 0; k < args.top_k; ++k) chosen[k] = out[ids[k]] / sum;
  for (int64_t e = 0; e < num; ++e) out[e] = -args.scale * (out[e] / sum) * mean;
  for (int64_t k = 0; k < args.top_k; ++k) out[ids[k]] = args.scale * chosen[k] * (grad[k] - mean);
}

// w_j = scale s_j, or scale s_j / S with S the sum over the chosen; ds/dz = s (1 - s).
void through_sigmoid(const ChooseExpertsBackwardArgs& args,
                     const float* z,
                     const int64_t* ids,
                     const float* grad,
                     float* out) {
  float s[kMaxChoices], sum = kTiny, mean = 0.0f;
  for (int64_t k = 0; k < args.top_k; ++k) sum += s[k] = sigmoid_of(z[ids[k]]);
  if (!args.renormalise) sum = 1.0f;
  if (args.renormalise) {
    for (int64_t k = 0; k < args.top_k; ++k) mean += grad[k] * (s[k] / sum);
  }
  for (int64_t k = 0; k < args.top_k; ++k) {
    out[ids[k]] = args.scale * (grad[k] - mean) / sum * s[k] * (1.0f - s[k]);
  }
}

EP_VECTORISED void backward(const ChooseExpertsBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const float* z = args.logits + token * args.num_experts;
    const int64_t* ids = args.ids + token * args.top_k;
    const float* grad = args.grad_weights + token * args.top_k;
    float* out = args.grad_logits + token * args.num_experts;
    std::fill_n(out, args.num_experts, 0.0f);
    if (args.score == Score::kLogit) {
      for (int64_t k = 0; k < args.top_k; ++k) out[ids[k]] = args.scale * grad[k];
    } else if (args.score == Score::kSigmoid) {
      through_sigmoid(args, z, ids, grad, out);
    } else if (args.score == Score::kSoftmax && !args.renormalise) {
      through_all(args, z, ids, grad, out);
    } else {
      through_chosen(args, z, ids, grad, out);
    }
  }
}

}  // namespace

void choose_experts_backward_cpu(const ChooseExpertsBackwardArgs& args, int64_t begin, int64_t end) {
  backward(args, begin, end);
}

}  // namespace ep
