// gather_rows: out[n] = weight[n] * x[row[n]]; without weights a copy, bit by bit. A row of -1 leaves out[n]
// alone.
#pragma once

#include "element.h"

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

struct GatherRowsArgs {
  const void* x;        // [any, dim]
  const int32_t* row;   // [num_rows], rows of x, or -1
  const float* weight;  // [num_rows], or null; the product is taken in float
  void* out;            // [num_rows, dim]
  int64_t num_rows;     // may be 0
  int64_t dim;
  int64_t x_stride;    // elements from one row to the next
  int64_t out_stride;  // likewise
  bool streaming;      // write past the caches (CPU)
  ElementType type;    // of x and out
};

// Rows [begin, end) of the output; ranges are independent of each other.
void gather_rows_cpu(const GatherRowsArgs& args, int64_t begin, int64_t end);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Returns the launch status; never prints, never exits.
cudaError_t gather_rows_cuda(const GatherRowsArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
