// quantise_rows: rows of x in 8 bits, e4m3 (arXiv:2209.05433), with one float scale for each kFp8Block
// neighbouring elements: x = scale * fp8, scale = max|x| / 448 of the block, 1 where that is zero.
// dequantise_rows: back.
#pragma once

#include "element.h"

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

constexpr int64_t kFp8Block = 128;

constexpr int64_t fp8_blocks(int64_t dim) { return (dim + kFp8Block - 1) / kFp8Block; }

struct QuantiseRowsArgs {
  const void* x;       // [any, dim]
  const int32_t* row;  // [num_rows], rows of x, or -1 to leave the output alone
  uint8_t* values;     // [num_rows, dim]
  float* scales;       // [num_rows, fp8_blocks(dim)]
  int64_t num_rows;    // may be 0
  int64_t dim;
  int64_t x_stride;       // elements from one row to the next
  int64_t values_stride;  // likewise
  int64_t scales_stride;  // likewise
  ElementType type;       // of x
};

struct DequantiseRowsArgs {
  const uint8_t* values;  // [num_rows, dim]
  const float* scales;    // [num_rows, fp8_blocks(dim)]
  void* out;              // [num_rows, dim], contiguous
  int64_t num_rows;       // may be 0
  int64_t dim;
  int64_t values_stride;  // elements from one row to the next
  int64_t scales_stride;  // likewise
  ElementType type;       // of out
};

// Rows [begin, end) of the output; ranges are independent of each other.
void quantise_rows_cpu(const QuantiseRowsArgs& args, int64_t begin, int64_t end);
void dequantise_rows_cpu(const DequantiseRowsArgs& args, int64_t begin, int64_t end);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Return the launch status; never print, never exit.
cudaError_t quantise_rows_cuda(const QuantiseRowsArgs& args, cudaStream_t stream);
cudaError_t dequantise_rows_cuda(const DequantiseRowsArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
