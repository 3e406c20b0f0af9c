// Torch side of quantise_rows and dequantise_rows: check, call.
#include "fp8_rows.h"

#include "tensor.h"

namespace ep {
namespace {

uint8_t* bytes(const Tensor& tensor, int64_t num_rows, int64_t dim, const Tensor& like) {
  check_rows(tensor, "values", dim, like);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.size(0) == num_rows,
                  "values must be uint8 with ",
                  num_rows,
                  " rows");
  return static_cast<uint8_t*>(tensor.mutable_data_ptr());
}

void quantise_rows(const Tensor& x, const Tensor& row, const Tensor& values, const Tensor& scales) {
  STD_TORCH_CHECK(x.dim() == 2, "quantise_rows: x must be a matrix of rows");
  const int64_t num_rows = row.numel(), dim = x.size(1);
  const QuantiseRowsArgs args{.x = rows(x, "x", -1, dim, x),
                              .row = data<int32_t>(row, "row", num_rows, x),
                              .values = bytes(values, num_rows, dim, x),
                              .scales = float_rows(scales, "scales", num_rows, fp8_blocks(dim), x),
                              .num_rows = num_rows,
                              .dim = dim,
                              .x_stride = row_stride(x),
                              .values_stride = row_stride(values),
                              .scales_stride = row_stride(scales),
                              .type = element_type(x)};
  EP_RETURN_IF_CUDA(x, quantise_rows_cuda, args)
  in_parallel(num_rows, dim, [&](int64_t begin, int64_t end) { quantise_rows_cpu(args, begin, end); });
}

void dequantise_rows(const Tensor& values, const Tensor& scales, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "dequantise_rows: out must be a contiguous matrix");
  const int64_t num_rows = out.size(0), dim = out.size(1);
  const DequantiseRowsArgs args{.values = bytes(values, num_rows, dim, out),
                                .scales = float_rows(scales, "scales", num_rows, fp8_blocks(dim), out),
                                .out = out.mutable_data_ptr(),
                                .num_rows = num_rows,
                                .dim = dim,
                                .values_stride = row_stride(values),
                                .scales_stride = row_stride(scales),
                                .type = element_type(out)};
  EP_RETURN_IF_CUDA(out, dequantise_rows_cuda, args)
  in_parallel(num_rows, dim, [&](int64_t begin, int64_t end) { dequantise_rows_cpu(args, begin, end); });
}

}  // namespace

EP_REGISTER({
  m.impl("quantise_rows", TORCH_BOX(&quantise_rows));
  m.impl("dequantise_rows", TORCH_BOX(&dequantise_rows));
})

}  // namespace ep
