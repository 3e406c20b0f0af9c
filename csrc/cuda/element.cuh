// Elements on the device: conversions, packs that are loaded in one go, and the switch over element types.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <initializer_list>

#include "element.h"

namespace ep {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// To nearest even, as on the host; only the payload of a NaN may differ.
template <typename T>
__device__ T narrow(float value);

template <>
__device__ inline float narrow<float>(float value) {
  return value;
}

template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Neighbouring elements of a row. The alignment lets a thread load them with one instruction.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

constexpr int64_t kVectorBytes = 16;  // the widest load of a thread

// A matrix of rows, and the elements from one to the next.
struct Rows {
  const void* first;
  int64_t stride;
};

// Calls launch(Pack<T, kWidth>{}): 16-byte packs if every row of `dim` elements starts on 16 bytes, else one
// element.
template <typename T, typename Launch>
void with_pack_of(int64_t dim, std::initializer_list<Rows> matrices, const Launch& launch) {
  constexpr int64_t kElements = kVectorBytes / sizeof(T);
  bool aligned = dim % kElements == 0;
  for (const Rows& rows : matrices) {
    aligned &= reinterpret_cast<uintptr_t>(rows.first) % kVectorBytes == 0 && rows.stride % kElements == 0;
  }
  if (aligned) {
    launch(Pack<T, kElements>{});
  } else {
    launch(Pack<T, 1>{});
  }
}

template <typename Launch>
void with_pack(ElementType type, int64_t dim, std::initializer_list<Rows> matrices, const Launch& launch) {
  if (type == ElementType::kFloat32) {
    with_pack_of<float>(dim, matrices, launch);
  } else {
    with_pack_of<__nv_bfloat16>(dim, matrices, launch);
  }
}

}  // namespace ep
