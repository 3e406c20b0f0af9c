// The element types that rows are made of, without torch.
#pragma once

#include <cstdint>
#include <cstring>

namespace ep {

enum class ElementType { kFloat32, kBFloat16 };

// bfloat16 on the host: the upper half of a float, rounded to nearest even (as torch rounds).
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {0x7fc0};  // rounding could carry a NaN over into infinity
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
float rounded(float value) {
  return to_float(from_float<T>(value));
}

}  // namespace ep
