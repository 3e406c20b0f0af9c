#include "choose_experts.h"
#include "warp.cuh"

namespace ep {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr float kTiny = 1e-20f;

// What the lanes of a warp know of one token: lane k of its k-th choice.
struct Choice {
  bool chosen;
  int64_t expert;
  float logit;
  float grad;  // of the weight
};

// Gradient of lane k's logit through a softmax over the chosen: scale q (g - sum of g q).
__device__ float through_chosen(const Choice& choice, float scale) {
  const float largest = warp_max(choice.chosen ? choice.logit : -INFINITY);
  const float power = choice.chosen ? expf(choice.logit - largest) : 0.0f;
  const float q = power / warp_sum(power);
  const float mean = warp_sum(choice.grad * q);
  return scale * q * (choice.grad - mean);
}

// Through sigmoids, divided by their sum if `renormalise`.
__device__ float through_sigmoid(const Choice& choice, bool renormalise, float scale) {
  const float s = choice.chosen ? sigmoid_of(choice.logit) : 0.0f;
  const float sum = renormalise ? warp_sum(s) + kTiny : 1.0f;
  const float mean = renormalise ? warp_sum(choice.grad * (s / sum)) : 0.0f;
  return scale * (choice.grad - mean) / sum * s * (1.0f - s);
}

// Through a softmax over all: scale p_e (g_e - sum of g p), g_e = 0 if not chosen. Writes what the others
// get.
__device__ float through_all(
    const Choice& choice, const float* z, int64_t num_experts, float scale, float* out) {
  const Softmax softmax = warp_softmax(z, num_experts);
  const float p = choice.chosen ? softmax.of(choice.logit) : 0.0f;
  const float mean = warp_sum(choice.grad * p);
  for (int64_t e = threadIdx.x; e < num_experts; e += kWarpSize) out[e] = -scale * softmax.of(z[e]) * mean;
  return scale * p * (choice.grad - mean);
}

// One warp makes the gradients of one token: first what every expert gets, then, behind the warp's barrier,
// what the chosen get. Lanes talk by shuffles only, hence no shared memory.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_tokens / kWarpsPerBlock).
__global__ void choose_experts_backward_kernel(const ChooseExpertsBackwardArgs args) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (t >= args.num_tokens) return;

  const float* z = args.logits + t * args.num_experts;
  float* out = args.grad_logits + t * args.num_experts;
  Choice choice{threadIdx.x < args.top_k, 0, 0.0f, 0.0f};
  if (choice.chosen) {
    choice.expert = args.ids[t * args.top_k + threadIdx.x];
    choice.logit = z[choice.expert];
    choice.grad = args.grad_weights[t * args.top_k + threadIdx.x];
  }
  float gradient;
  if (args.score == Score::kSoftmax && !args.renormalise) {
    gradient = through_all(choice, z, args.num_experts, args.scale, out);
  } else {
    for (int64_t e = threadIdx.x; e < args.num_experts; e += kWarpSize) out[e] = 0.0f;
    switch (args.score) {
      case Score::kLogit:
        gradient = args.scale * choice.grad;
        break;
      case Score::kSigmoid:
        gradient = through_sigmoid(choice, args.renormalise, args.scale);
        break;
      default:
        gradient = through_chosen(choice, args.scale);
    }
  }
  __syncwarp();  // an expert's place is written by another lane before
  if (choice.chosen) out[choice.expert] = gradient;
}

}  // namespace

cudaError_t choose_experts_backward_cuda(const ChooseExpertsBackwardArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;  // an empty grid is a launch error

  const dim3 block(kWarpSize, kWarpsPerBlock);
  const auto grid = static_cast<unsigned>((args.num_tokens + kWarpsPerBlock - 1) / kWarpsPerBlock);
  choose_experts_backward_kernel<<<grid, block, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace ep
