#include "choice_weights.h"

namespace ep {
namespace {

constexpr int kThreadsPerBlock = 256;

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>((count + kThreadsPerBlock - 1) / kThreadsPerBlock);
}

// One thread for each column of each row; all are independent.
//
// Block kThreadsPerBlock; grid ceil(num_rows * row_width / kThreadsPerBlock).
__global__ void choice_weights_kernel(const ChoiceWeightsArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.num_rows * args.row_width) return;
  const int32_t choice = args.choice[i];
  args.rows[i / args.row_width * args.rows_stride + i % args.row_width] =
      choice < 0 ? 0.0f : args.weights[choice];
}

// Likewise. A choice stands in one row at most, so no two threads write to one place.
__global__ void choice_weights_backward_kernel(const ChoiceWeightsBackwardArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.num_rows * args.row_width || args.choice[i] < 0) return;
  args.grad_weights[args.choice[i]] =
      args.grad_rows[i / args.row_width * args.rows_stride + i % args.row_width];
}

}  // namespace

cudaError_t choice_weights_cuda(const ChoiceWeightsArgs& args, cudaStream_t stream) {
  const int64_t count = args.num_rows * args.row_width;
  if (count == 0) return cudaSuccess;  // an empty grid is a launch error
  choice_weights_kernel<<<blocks_for(count), kThreadsPerBlock, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t choice_weights_backward_cuda(const ChoiceWeightsBackwardArgs& args, cudaStream_t stream) {
  const int64_t count = args.num_rows * args.row_width;
  if (count == 0) return cudaSuccess;  // an empty grid is a launch error
  choice_weights_backward_kernel<<<blocks_for(count), kThreadsPerBlock, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace ep
