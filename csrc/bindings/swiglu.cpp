// Torch side of swiglu and its backward: check, call.
#include "swiglu.h"

#include "tensor.h"

namespace ep {
namespace {

void swiglu(const Tensor& gate_up, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2, "swiglu: out must be a matrix");
  const int64_t num_rows = out.size(0), dim = out.size(1);
  const SwigluArgs args{.gate_up = whole(gate_up, "gate_up", num_rows, 2 * dim, out),
                        .out = whole(out, "out", num_rows, dim, out),
                        .num_rows = num_rows,
                        .dim = dim,
                        .type = element_type(out)};
  EP_RETURN_IF_CUDA(out, swiglu_cuda, args)
  in_parallel(args.num_rows, args.dim, [&](int64_t begin, int64_t end) { swiglu_cpu(args, begin, end); });
}

void swiglu_backward(const Tensor& grad,
                     const Tensor& gate_up,
                     const Tensor& weight,
                     const Tensor& grad_gate_up,
                     const Tensor& hidden,
                     const Tensor& grad_weight) {
  STD_TORCH_CHECK(grad.dim() == 2, "swiglu_backward: grad must be a matrix");
  const int64_t num_rows = grad.size(0), dim = grad.size(1);
  const SwigluBackwardArgs args{.grad = whole(grad, "grad", num_rows, dim, grad),
                                .gate_up = whole(gate_up, "gate_up", num_rows, 2 * dim, grad),
                                .weight = data<float>(weight, "weight", num_rows, grad),
                                .grad_gate_up = whole(grad_gate_up, "grad_gate_up", num_rows, 2 * dim, grad),
                                .hidden = whole(hidden, "hidden", num_rows, dim, grad),
                                .grad_weight = data<float>(grad_weight, "grad_weight", num_rows, grad),
                                .num_rows = num_rows,
                                .dim = dim,
                                .type = element_type(grad)};
  EP_RETURN_IF_CUDA(grad, swiglu_backward_cuda, args)
  in_parallel(
      args.num_rows, args.dim, [&](int64_t begin, int64_t end) { swiglu_backward_cpu(args, begin, end); });
}

}  // namespace

EP_REGISTER({
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
})

}  // namespace ep
