// swiglu: out = silu(gate) * up (arXiv:2002.05202 eq. 6), computed in float and rounded once.
// swiglu_backward: from the gradient of what the down projection was given, unweighted, all that the rest of
// the backward needs; a row's combine weight is applied here, so the expert's output need not be kept.
#pragma once

#include "element.h"

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

struct SwigluArgs {
  const void* gate_up;  // [num_rows, 2 * dim]: gate, then up
  void* out;            // [num_rows, dim]
  int64_t num_rows;     // may be 0
  int64_t dim;
  ElementType type;  // of gate_up and out
};

struct SwigluBackwardArgs {
  const void* grad;     // [num_rows, dim]: g W_down for a row whose output has the gradient weight * g
  const void* gate_up;  // [num_rows, 2 * dim]: gate, then up
  const float* weight;  // [num_rows]
  void*
      grad_gate_up;  // [num_rows, 2 * dim]: weight * grad * up * silu'(gate), then weight * grad * silu(gate)
  void* hidden;      // [num_rows, dim]: weight * silu(gate) * up; its product with g is that of W_down
  float* grad_weight;  // [num_rows]: <grad, silu(gate) * up>
  int64_t num_rows;    // may be 0
  int64_t dim;
  ElementType type;  // of all matrices
};

// Rows [begin, end); ranges are independent of each other.
void swiglu_cpu(const SwigluArgs& args, int64_t begin, int64_t end);
void swiglu_backward_cpu(const SwigluBackwardArgs& args, int64_t begin, int64_t end);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Return the launch status; never print, never exit.
cudaError_t swiglu_cuda(const SwigluArgs& args, cudaStream_t stream);
cudaError_t swiglu_backward_cuda(const SwigluBackwardArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
