// The dot product of two rows, with a fixed order of additions.
#pragma once

#include <cstdint>

#include "element.h"

namespace ep {

// Eight running sums, so that the compiler can keep them in one vector; the order of additions is fixed.
template <typename T>
inline float dot(const T* a, const T* b, int64_t dim) {
  constexpr int kLanes = 8;
  float lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += to_float(a[d + lane]) * to_float(b[d + lane]);
  }
  for (; d < dim; ++d) lanes[d % kLanes] += to_float(a[d]) * to_float(b[d]);
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

}  // namespace ep
