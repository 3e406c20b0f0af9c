// Torch side of gather_rows: check, call.
#include "gather_rows.h"

#include "tensor.h"

namespace ep {
namespace {

void gather_rows(const Tensor& x, const Tensor& row, const std::optional<Tensor>& weight, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 2, "gather_rows: x must be a matrix of rows");
  const int64_t num_rows = row.numel(), dim = x.size(1);
  const GatherRowsArgs args{.x = rows(x, "x", dim, x),
                            .row = data<int32_t>(row, "row", num_rows, x),
                            .weight = weight ? data<float>(*weight, "weight", num_rows, x) : nullptr,
                            .out = rows(out, "out", dim, x),
                            .num_rows = num_rows,
                            .dim = dim,
                            .type = element_type(x)};
  STD_TORCH_CHECK(out.size(0) == num_rows, "gather_rows: out must have ", num_rows, " rows");
#ifdef EP_WITH_CUDA
  if (x.is_cuda()) {
    on_stream(x, "gather_rows", [&](cudaStream_t stream) { return gather_rows_cuda(args, stream); });
    return;
  }
#endif
  in_parallel(num_rows, dim, [&](int64_t begin, int64_t end) { gather_rows_cpu(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows)); }
#ifdef EP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ep_engine, CUDA, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows)); }
#endif

}  // namespace ep
