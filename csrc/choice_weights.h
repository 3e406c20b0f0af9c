// choice_weights: rows[s, w] = weights[choice[s, w]], and 0 where the choice is -1: each row's combine
// weights. choice_weights_backward: its transpose; a choice stands in one row at most, so nothing is added
// up.
#pragma once

#include <cstdint>

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

struct ChoiceWeightsArgs {
  const float* weights;   // [any]
  const int32_t* choice;  // [num_rows, row_width], or -1
  float* rows;            // [num_rows, row_width]
  int64_t num_rows;       // may be 0
  int64_t row_width;
  int64_t rows_stride;  // elements from one row to the next
};

struct ChoiceWeightsBackwardArgs {
  const float* grad_rows;  // [num_rows, row_width]
  const int32_t* choice;   // [num_rows, row_width], or -1
  float* grad_weights;     // [any], written where a choice points
  int64_t num_rows;        // may be 0
  int64_t row_width;
  int64_t rows_stride;  // elements from one row of grad_rows to the next
};

void choice_weights_cpu(const ChoiceWeightsArgs& args);
void choice_weights_backward_cpu(const ChoiceWeightsBackwardArgs& args);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Return the launch status; never print, never exit.
cudaError_t choice_weights_cuda(const ChoiceWeightsArgs& args, cudaStream_t stream);
cudaError_t choice_weights_backward_cuda(const ChoiceWeightsBackwardArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
