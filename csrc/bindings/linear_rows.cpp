// Torch side of linear_rows: check, call.
#include "linear_rows.h"

#include "tensor.h"

namespace ep {
namespace {

void linear_rows(const Tensor& x, const Tensor& w, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2, "linear_rows: x and w must be matrices");
  const int64_t num_rows = x.size(0), inner = x.size(1), outer = w.size(0);
  const LinearRowsArgs args{.x = data<float>(x, "x", num_rows * inner, x),
                            .w = data<float>(w, "w", outer * inner, x),
                            .out = data<float>(out, "out", num_rows * outer, x),
                            .num_rows = num_rows,
                            .inner = inner,
                            .outer = outer};
  in_parallel(
      num_rows, inner * outer, [&](int64_t begin, int64_t end) { linear_rows_cpu(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) { m.impl("linear_rows", TORCH_BOX(&linear_rows)); }

}  // namespace ep
