// Torch side of gather_rows: check, call.
#include "gather_rows.h"

#include "tensor.h"

namespace ep {
namespace {

void gather_rows(const Tensor& x,
                 const Tensor& row,
                 const std::optional<Tensor>& weight,
                 bool streaming,
                 const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 2, "gather_rows: x must be a matrix of rows");
  const int64_t num_rows = row.numel(), dim = x.size(1);
  const GatherRowsArgs args{.x = rows(x, "x", -1, dim, x),
                            .row = data<int32_t>(row, "row", num_rows, x),
                            .weight = weight ? data<float>(*weight, "weight", num_rows, x) : nullptr,
                            .out = rows(out, "out", num_rows, dim, x),
                            .num_rows = num_rows,
                            .dim = dim,
                            .x_stride = row_stride(x),
                            .out_stride = row_stride(out),
                            .streaming = streaming,
                            .type = element_type(x)};
  EP_RETURN_IF_CUDA(x, gather_rows_cuda, args)
  in_parallel(num_rows, dim, [&](int64_t begin, int64_t end) { gather_rows_cpu(args, begin, end); });
}

}  // namespace

EP_REGISTER({ m.impl("gather_rows", TORCH_BOX(&gather_rows)); })

}  // namespace ep
