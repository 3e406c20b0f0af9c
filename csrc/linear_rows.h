// linear_rows: out[t, n] = sum over k of x[t, k] * w[k, n], in float, on the CPU.
//
// A row of the result depends on its row of x alone, bit by bit: not on how many rows there are, nor on where
// it stands among them or in memory. A BLAS promises none of that, and the router's logits decide which
// experts a token meets.
#pragma once

#include <cstdint>

namespace ep {

struct LinearRowsArgs {
  const float* x;  // [num_rows, inner]
  const float* w;  // [inner, outer], element (k, n) at k * w_inner_stride + n * w_outer_stride
  float* out;      // [num_rows, outer]
  int64_t num_rows;
  int64_t inner;
  int64_t outer;
  int64_t w_inner_stride;
  int64_t w_outer_stride;
};

// Rows [begin, end) of the output; ranges are independent of each other.
void linear_rows_cpu(const LinearRowsArgs& args, int64_t begin, int64_t end);

}  // namespace ep
