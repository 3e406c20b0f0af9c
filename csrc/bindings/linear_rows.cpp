// Torch side of linear_rows: check, call.
#include "linear_rows.h"

#include "tensor.h"

namespace ep {
namespace {

void linear_rows(const Tensor& x, const Tensor& w, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2, "linear_rows: x and w must be matrices");
  const int64_t num_rows = x.size(0), inner = x.size(1), outer = w.size(1);
  STD_TORCH_CHECK(w.size(0) == inner && w.scalar_type() == ScalarType::Float,
                  "linear_rows: w must be float32 with a row for each of the ",
                  inner,
                  " columns of x");
  const LinearRowsArgs args{.x = data<float>(x, "x", num_rows * inner, x),
                            .w = static_cast<const float*>(w.mutable_data_ptr()),
                            .out = data<float>(out, "out", num_rows * outer, x),
                            .num_rows = num_rows,
                            .inner = inner,
                            .outer = outer,
                            .w_inner_stride = w.stride(0),
                            .w_outer_stride = w.stride(1)};
  in_parallel(
      num_rows, inner * outer, [&](int64_t begin, int64_t end) { linear_rows_cpu(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) { m.impl("linear_rows", TORCH_BOX(&linear_rows)); }

}  // namespace ep
