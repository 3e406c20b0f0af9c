// Reductions over the lanes of a warp. All lanes get the result, in an order that is always the same.
#pragma once

#include "element.cuh"

namespace ep {

__device__ inline float warp_sum(float value) {
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

template <typename T>
__device__ T warp_max(T value) {
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, apart);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }

}  // namespace ep
