// combine_rows: out[r] = sum over c of weight[r, c] * y[index[r, c]], summed along a tree.
//
// The tree makes the sum independent of how it is cut into ranks. leaf[r, c] is the place of a copy; at level
// l copies whose leaf / group_sizes[l] is equal are in one group. A group sums its children in their order in
// float and rounds the sum to the element type, groups without a copy are skipped, and the outermost group is
// the output. A part of the tree that was summed elsewhere, and so rounded, gives the same bits as if it had
// been summed here.
#pragma once

#include "element.h"

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

constexpr int kMaxTreeLevels = 8;

struct CombineRowsArgs {
  const void* y;         // [any, dim]
  const int32_t* index;  // [num_rows, num_columns], rows of y, then -1
  const int32_t* leaf;   // [num_rows, num_columns], ascending, then -1
  const float* weight;   // [num_rows, num_columns], or null for 1
  void* out;             // [num_rows, dim]; 0 where a row has no copy
  int64_t num_rows;      // may be 0
  int64_t num_columns;
  int64_t dim;
  int64_t y_stride;                     // elements from one row to the next
  int64_t out_stride;                   // likewise
  int64_t group_sizes[kMaxTreeLevels];  // leaves of a group, innermost level first, each a multiple of the
                                        // one before
  int num_levels;                       // in [1, kMaxTreeLevels]; the last level is one group
  bool streaming;                       // write past the caches (CPU)
  ElementType type;                     // of y and out
};

// Rows [begin, end) of the output; ranges are independent of each other.
void combine_rows_cpu(const CombineRowsArgs& args, int64_t begin, int64_t end);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Returns the launch status; never prints, never exits.
cudaError_t combine_rows_cuda(const CombineRowsArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
