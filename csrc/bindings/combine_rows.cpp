// Torch side of combine_rows: check, call.
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
                  bool streaming,
                  const Tensor& out) {
  STD_TORCH_CHECK(y.dim() == 2 && index.dim() == 2, "combine_rows: y and index must be matrices");
  const int64_t num_rows = index.size(0), num_columns = index.size(1), dim = y.size(1);
  const auto num_levels = static_cast<int64_t>(group_sizes.size());
  STD_TORCH_CHECK(num_levels >= 1 && num_levels <= kMaxTreeLevels,
                  "combine_rows: group_sizes must have 1..",
                  kMaxTreeLevels,
                  " levels, got ",
                  num_levels);
  CombineRowsArgs args{.y = rows(y, "y", -1, dim, y),
                       .index = data<int32_t>(index, "index", num_rows * num_columns, y),
                       .leaf = data<int32_t>(leaf, "leaf", num_rows * num_columns, y),
                       .weight = weight ? data<float>(*weight, "weight", num_rows * num_columns, y) : nullptr,
                       .out = rows(out, "out", num_rows, dim, y),
                       .num_rows = num_rows,
                       .num_columns = num_columns,
                       .dim = dim,
                       .y_stride = row_stride(y),
                       .out_stride = row_stride(out),
                       .group_sizes = {},
                       .num_levels = static_cast<int>(num_levels),
                       .streaming = streaming,
                       .type = element_type(y)};
  for (int64_t level = 0; level < num_levels; ++level) args.group_sizes[level] = group_sizes[level];
  EP_RETURN_IF_CUDA(y, combine_rows_cuda, args)
  in_parallel(
      num_rows, dim * num_columns, [&](int64_t begin, int64_t end) { combine_rows_cpu(args, begin, end); });
}

}  // namespace

EP_REGISTER({ m.impl("combine_rows", TORCH_BOX(&combine_rows)); })

}  // namespace ep
