// Torch side of choice_weights and its backward: check, call.
#include "choice_weights.h"

#include "tensor.h"

namespace ep {
namespace {

void choice_weights(const Tensor& weights, const Tensor& choice, const Tensor& rows) {
  STD_TORCH_CHECK(choice.dim() == 2, "choice_weights: choice must be a matrix");
  const int64_t num_rows = choice.size(0), width = choice.size(1);
  const ChoiceWeightsArgs args{.weights = data<float>(weights, "weights", weights.numel(), weights),
                               .choice = data<int32_t>(choice, "choice", num_rows * width, weights),
                               .rows = float_rows(rows, "rows", num_rows, width, weights),
                               .num_rows = num_rows,
                               .row_width = width,
                               .rows_stride = row_stride(rows)};
  EP_RETURN_IF_CUDA(weights, choice_weights_cuda, args)
  choice_weights_cpu(args);
}

void choice_weights_backward(const Tensor& grad_rows, const Tensor& choice, const Tensor& grad_weights) {
  STD_TORCH_CHECK(choice.dim() == 2, "choice_weights_backward: choice must be a matrix");
  const int64_t num_rows = choice.size(0), width = choice.size(1);
  const ChoiceWeightsBackwardArgs args{
      .grad_rows = float_rows(grad_rows, "grad_rows", num_rows, width, grad_rows),
      .choice = data<int32_t>(choice, "choice", num_rows * width, grad_rows),
      .grad_weights = data<float>(grad_weights, "grad_weights", grad_weights.numel(), grad_rows),
      .num_rows = num_rows,
      .row_width = width,
      .rows_stride = row_stride(grad_rows)};
  EP_RETURN_IF_CUDA(grad_rows, choice_weights_backward_cuda, args)
  choice_weights_backward_cpu(args);
}

}  // namespace

EP_REGISTER({
  m.impl("choice_weights", TORCH_BOX(&choice_weights));
  m.impl("choice_weights_backward", TORCH_BOX(&choice_weights_backward));
})

}  // namespace ep
