#include "swiglu.h"
#include "warp.cuh"

namespace ep {
namespace {

constexpr int kWarpsPerBlock = 8;

// One warp makes one row: lane i takes packs i, i + 32, ..., so a step of the warp reads contiguous bytes.
// Rows are independent, hence no shared memory and no synchronisation.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_rows / kWarpsPerBlock).
template <typename T, int kWidth>
__global__ void swiglu_kernel(const SwigluArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (row >= args.num_rows) return;

  const int64_t row_packs = args.dim / kWidth;
  const auto* gate = static_cast<const Pack<T, kWidth>*>(args.gate_up) + 2 * row * row_packs;
  const auto* up = gate + row_packs;
  auto* out = static_cast<Pack<T, kWidth>*>(args.out) + row * row_packs;
  for (int64_t p = threadIdx.x; p < row_packs; p += kWarpSize) {
    const Pack<T, kWidth> g = gate[p], u = up[p];
    Pack<T, kWidth> result;
    for (int i = 0; i < kWidth; ++i) {
      const float wide = widen(g.values[i]);
      result.values[i] = narrow<T>(wide * sigmoid_of(wide) * widen(u.values[i]));
    }
    out[p] = result;
  }
}

// One warp makes the gradients of one row. Lane i sums the products of its packs and the lanes are added in
// pairs: a fixed order, so the gradient of the weight is the same from run to run. Lanes talk by shuffles
// only, hence no shared memory and no synchronisation.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_rows / kWarpsPerBlock).
template <typename T, int kWidth>
__global__ void swiglu_backward_kernel(const SwigluBackwardArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (row >= args.num_rows) return;

  const int64_t row_packs = args.dim / kWidth;
  const auto* grad = static_cast<const Pack<T, kWidth>*>(args.grad) + row * row_packs;
  const auto* gate = static_cast<const Pack<T, kWidth>*>(args.gate_up) + 2 * row * row_packs;
  const auto* up = gate + row_packs;
  auto* grad_gate = static_cast<Pack<T, kWidth>*>(args.grad_gate_up) + 2 * row * row_packs;
  auto* grad_up = grad_gate + row_packs;
  auto* hidden = static_cast<Pack<T, kWidth>*>(args.hidden) + row * row_packs;
  const float weight = args.weight[row];
  float sum = 0.0f;
  for (int64_t p = threadIdx.x; p < row_packs; p += kWarpSize) {
    const Pack<T, kWidth> d = grad[p], g = gate[p], u = up[p];
    Pack<T, kWidth> to_gate, to_up, to_hidden;
    for (int i = 0; i < kWidth; ++i) {
      const float wide = widen(g.values[i]), factor = widen(u.values[i]), given = widen(d.values[i]);
      const float s = sigmoid_of(wide), silu = wide * s, weighted = weight * given;
      to_gate.values[i] = narrow<T>(weighted * factor * (s + silu * (1.0f - s)));
      to_up.values[i] = narrow<T>(weighted * silu);
      to_hidden.values[i] = narrow<T>(weight * (silu * factor));
      sum += given * (silu * factor);
    }
    grad_gate[p] = to_gate;
    grad_up[p] = to_up;
    hidden[p] = to_hidden;
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) args.grad_weight[row] = sum;
}

unsigned blocks_for(int64_t num_rows) {
  return static_cast<unsigned>((num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

}  // namespace

cudaError_t swiglu_cuda(const SwigluArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  const dim3 block(kWarpSize, kWarpsPerBlock);
  const Rows gate_up{args.gate_up, 2 * args.dim}, out{args.out, args.dim};
  with_pack(args.type, args.dim, {gate_up, out}, [&]<typename T, int kWidth>(Pack<T, kWidth>) {
    swiglu_kernel<T, kWidth><<<blocks_for(args.num_rows), block, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

cudaError_t swiglu_backward_cuda(const SwigluBackwardArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  const dim3 block(kWarpSize, kWarpsPerBlock);
  const Rows grad{args.grad, args.dim}, gate_up{args.gate_up, 2 * args.dim}, hidden{args.hidden, args.dim};
  const Rows grad_gate_up{args.grad_gate_up, 2 * args.dim};
  with_pack(args.type,
            args.dim,
            {grad, gate_up, grad_gate_up, hidden},
            [&]<typename T, int kWidth>(Pack<T, kWidth>) {
              swiglu_backward_kernel<T, kWidth><<<blocks_for(args.num_rows), block, 0, stream>>>(args);
            });
  return cudaGetLastError();
}

}  // namespace ep
