// expert_products: the SwiGLU experts of a rank on CPU, forward and backward (arXiv:2002.05202 eq. 6).
//
//   gate_up = x[copy_row] w_gate_up^T      y = (silu(gate) * up) w_down^T
//
// Copies stand by slot. A matrix product is unpadded and in one thread, and threads take experts from one
// queue, the largest first: so the bits of an expert's output depend on its rows alone, not on how many other
// experts share the rank. An expert's input is gathered again for the backward, its output is not needed
// (swiglu.h). The products are the caller's, because a BLAS is.
#pragma once

#include <cstdint>
#include <functional>

#include "element.h"
#include "parallel_for.h"

namespace ep {

struct Matrix {
  const void* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // in elements
};

// out = a b, computed by the calling thread alone.
using Multiply = std::function<void(const Matrix& a, const Matrix& b, const Matrix& out)>;

struct ExpertsArgs {
  const void* x;                  // [any, dim], arrived rows
  const int32_t* copy_row;        // [num_copies], the row each copy comes from
  const int32_t* copies_of_slot;  // [num_slots], their sum is num_copies
  const void* w_gate_up;          // [num_slots, 2 * width, dim], gate first
  const void* w_down;             // [num_slots, dim, width]
  int64_t x_stride;               // elements from one row to the next
  int64_t num_slots, dim, width;
  ElementType type;  // of all matrices

  void* gate_up;  // [num_copies, 2 * width], written by the forward, read by the backward
  void* y;        // [num_copies, dim], written by the forward; null if only gate_up is wanted

  const void* grad;      // [any, dim], of a row's weighted sum
  int64_t grad_stride;   // elements from one row to the next
  const float* weight;   // [num_copies]
  void* grad_x;          // [num_copies, dim], as the next written by the backward
  float* grad_weight;    // [num_copies]
  void* grad_gate_up;    // [num_copies, 2 * width], and
  void* hidden;          // [num_copies, width]: what weight gradients that come later need; else null
  void* grad_w_gate_up;  // as w_gate_up, and
  void* grad_w_down;     // as w_down, 0 for slots without copies; null if they come later
};

void experts_forward_cpu(const ExpertsArgs& args, const Multiply& multiply, const ParallelFor& parallel_for);
void experts_backward_cpu(const ExpertsArgs& args, const Multiply& multiply, const ParallelFor& parallel_for);

// The weight gradients that experts_backward_cpu left out, of the grad_gate_up and hidden it kept.
void experts_weight_grads_cpu(const ExpertsArgs& args,
                              const Multiply& multiply,
                              const ParallelFor& parallel_for);

}  // namespace ep
