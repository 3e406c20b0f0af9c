// Torch side of combine_rows and combine_rows_weight_grad: check, call.
#include "combine_rows.h"

#include <vector>

#include "tensor.h"

namespace ep {
namespace {

void combine_rows(const Tensor& y,
                  const Tensor& index,
                  const Tensor& leaf,
                  const std::optional<Tensor>& weight,
                  std::vector<int64_t> group_sizes,
                  const Tensor& out) {
  STD_TORCH_CHECK(y.dim() == 2 && index.dim() == 2, "combine_rows: y and index must be matrices");
  const int64_t num_rows = index.size(0), num_columns = index.size(1), dim = y.size(1);
  const auto num_levels = static_cast<int64_t>(group_sizes.size());
  STD_TORCH_CHECK(num_levels >= 1 && num_levels <= kMaxTreeLevels,
                  "combine_rows: group_sizes must have 1..",
                  kMaxTreeLevels,
                  " levels, got ",
                  num_levels);
  CombineRowsArgs args{.y = rows(y, "y", dim, y),
                       .index = data<int32_t>(index, "index", num_rows * num_columns, y),
                       .leaf = data<int32_t>(leaf, "leaf", num_rows * num_columns, y),
                       .weight = weight ? data<float>(*weight, "weight", num_rows * num_columns, y) : nullptr,
                       .out = rows(out, "out", dim, y),
                       .num_rows = num_rows,
                       .num_columns = num_columns,
                       .dim = dim,
                       .group_sizes = {},
                       .num_levels = static_cast<int>(num_levels),
                       .type = element_type(y)};
  for (int64_t level = 0; level < num_levels; ++level) args.group_sizes[level] = group_sizes[level];
  STD_TORCH_CHECK(out.size(0) == num_rows, "combine_rows: out must have ", num_rows, " rows");
#ifdef EP_WITH_CUDA
  if (y.is_cuda()) {
    on_stream(y, "combine_rows", [&](cudaStream_t stream) { return combine_rows_cuda(args, stream); });
    return;
  }
#endif
  in_parallel(
      num_rows, dim * num_columns, [&](int64_t begin, int64_t end) { combine_rows_cpu(args, begin, end); });
}

void combine_rows_weight_grad(const Tensor& grad_out,
                              const Tensor& y,
                              const Tensor& index,
                              const Tensor& grad_weight) {
  STD_TORCH_CHECK(y.dim() == 2 && index.dim() == 2, "combine_rows_weight_grad: y and index must be matrices");
  const int64_t num_rows = index.size(0), num_columns = index.size(1), dim = y.size(1);
  const CombineRowsWeightGradArgs args{
      .grad_out = rows(grad_out, "grad_out", dim, y),
      .y = rows(y, "y", dim, y),
      .index = data<int32_t>(index, "index", num_rows * num_columns, y),
      .grad_weight = data<float>(grad_weight, "grad_weight", num_rows * num_columns, y),
      .num_rows = num_rows,
      .num_columns = num_columns,
      .dim = dim,
      .type = element_type(y)};
  STD_TORCH_CHECK(
      grad_out.size(0) == num_rows, "combine_rows_weight_grad: grad_out must have ", num_rows, " rows");
#ifdef EP_WITH_CUDA
  if (y.is_cuda()) {
    on_stream(y, "combine_rows_weight_grad", [&](cudaStream_t stream) {
      return combine_rows_weight_grad_cuda(args, stream);
    });
    return;
  }
#endif
  in_parallel(num_rows, dim * num_columns, [&](int64_t begin, int64_t end) {
    combine_rows_weight_grad_cpu(args, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) {
  m.impl("combine_rows", TORCH_BOX(&combine_rows));
  m.impl("combine_rows_weight_grad", TORCH_BOX(&combine_rows_weight_grad));
}
#ifdef EP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ep_engine, CUDA, m) {
  m.impl("combine_rows", TORCH_BOX(&combine_rows));
  m.impl("combine_rows_weight_grad", TORCH_BOX(&combine_rows_weight_grad));
}
#endif

}  // namespace ep
