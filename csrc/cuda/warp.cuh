// What the lanes of a warp work out together. All lanes get the result, in an order that is always the same.
#pragma once

#include "element.cuh"

namespace ep {

__device__ inline float warp_sum(float value) {
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

// Over groups of `kLanes` neighbouring lanes, a power of two. Of floats, a NaN counts for nothing.
template <int kLanes = kWarpSize, typename T>
__device__ T warp_max(T value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, apart));
  }
  return value;
}

__device__ inline float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }

// What a softmax over all logits needs to know of them.
struct Softmax {
  float largest;  // logit
  float sum;      // of the exponentials

  __device__ float of(float logit) const { return expf(logit - largest) / sum; }
};

__device__ inline Softmax warp_softmax(const float* logits, int64_t count) {
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kWarpSize) largest = fmaxf(largest, logits[i]);
  largest = warp_max(largest);
  for (int64_t i = threadIdx.x; i < count; i += kWarpSize) sum += expf(logits[i] - largest);
  return {largest, warp_sum(sum)};
}

}  // namespace ep
