#include "swiglu.h"

#include <algorithm>

#include "exp.h"
#include "vectorise.h"

namespace ep {
namespace {

template <typename T>
void forward(const SwigluArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate_up) + 2 * row * args.dim;
    const T* up = gate + args.dim;
    T* out = static_cast<T*>(args.out) + row * args.dim;
    for (int64_t i = 0; i < args.dim; ++i) {
      const float g = to_float(gate[i]);
      out[i] = from_float<T>(g * sigmoid_of(g) * to_float(up[i]));
    }
  }
}

// One row's gradients, a block at a time: elements first, then their products into the running sums.
template <typename T>
float backward_row(const SwigluBackwardArgs& args, int64_t row) {
  constexpr int64_t kBlock = 64, kLanes = 16;  // so that vectors do the sums, in an order that is fixed
  const float weight = args.weight[row];
  float lanes[kLanes] = {};
  for (int64_t begin = 0; begin < args.dim; begin += kBlock) {
    const int64_t size = std::min(kBlock, args.dim - begin), first = row * args.dim + begin;
    const T* grad = static_cast<const T*>(args.grad) + first;
    const T* gate = static_cast<const T*>(args.gate_up) + first + row * args.dim;
    const T* up = gate + args.dim;
    T* grad_gate = static_cast<T*>(args.grad_gate_up) + first + row * args.dim;
    T* grad_up = grad_gate + args.dim;
    T* hidden = static_cast<T*>(args.hidden) + first;
    float products[kBlock] = {};
#pragma GCC ivdep  // more pointers than the compiler would compare at run time
    for (int64_t i = 0; i < size; ++i) {
      const float g = to_float(gate[i]), u = to_float(up[i]), d = to_float(grad[i]);
      const float s = sigmoid_of(g), silu = g * s, weighted = weight * d;
      grad_gate[i] = from_float<T>(weighted * u * (s + silu * (1.0f - s)));
      grad_up[i] = from_float<T>(weighted * silu);
      hidden[i] = from_float<T>(weight * (silu * u));
      products[i] = d * (silu * u);
    }
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += products[i + lane];
    }
  }
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

template <typename T>
void backward(const SwigluBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) args.grad_weight[row] = backward_row<T>(args, row);
}

EP_VECTORISED void forward_float(const SwigluArgs& args, int64_t begin, int64_t end) {
  forward<float>(args, begin, end);
}

EP_VECTORISED void forward_bfloat16(const SwigluArgs& args, int64_t begin, int64_t end) {
  forward<BFloat16>(args, begin, end);
}

EP_VECTORISED void backward_float(const SwigluBackwardArgs& args, int64_t begin, int64_t end) {
  backward<float>(args, begin, end);
}

EP_VECTORISED void backward_bfloat16(const SwigluBackwardArgs& args, int64_t begin, int64_t end) {
  backward<BFloat16>(args, begin, end);
}

}  // namespace

void swiglu_cpu(const SwigluArgs& args, int64_t begin, int64_t end) {
  (args.type == ElementType::kFloat32 ? forward_float : forward_bfloat16)(args, begin, end);
}

void swiglu_backward_cpu(const SwigluBackwardArgs& args, int64_t begin, int64_t end) {
  (args.type == ElementType::kFloat32 ? backward_float : backward_bfloat16)(args, begin, end);
}

}  // namespace ep
