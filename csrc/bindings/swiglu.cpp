// Torch side of swiglu and its backward: check, call.
#include "swiglu.h"

#include "tensor.h"

namespace ep {
namespace {

// Memory of a contiguous matrix like `like`.
void* same(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return rows(tensor, name, like.size(0), like.size(1), like);
}

void swiglu(const Tensor& gate, const Tensor& up, const Tensor& out) {
  STD_TORCH_CHECK(gate.dim() == 2, "swiglu: gate must be a matrix");
  const SwigluArgs args{.gate = same(gate, "gate", gate),
                        .up = same(up, "up", gate),
                        .out = same(out, "out", gate),
                        .num_rows = gate.size(0),
                        .dim = gate.size(1),
                        .type = element_type(gate)};
  EP_RETURN_IF_CUDA(gate, swiglu_cuda, args)
  in_parallel(args.num_rows, args.dim, [&](int64_t begin, int64_t end) { swiglu_cpu(args, begin, end); });
}

void swiglu_backward(const Tensor& grad,
                     const Tensor& gate,
                     const Tensor& up,
                     const Tensor& weight,
                     const Tensor& grad_gate,
                     const Tensor& grad_up,
                     const Tensor& hidden,
                     const Tensor& grad_weight) {
  STD_TORCH_CHECK(grad.dim() == 2, "swiglu_backward: grad must be a matrix");
  const int64_t num_rows = grad.size(0);
  const SwigluBackwardArgs args{.grad = same(grad, "grad", grad),
                                .gate = same(gate, "gate", grad),
                                .up = same(up, "up", grad),
                                .weight = data<float>(weight, "weight", num_rows, grad),
                                .grad_gate = same(grad_gate, "grad_gate", grad),
                                .grad_up = same(grad_up, "grad_up", grad),
                                .hidden = same(hidden, "hidden", grad),
                                .grad_weight = data<float>(grad_weight, "grad_weight", num_rows, grad),
                                .num_rows = num_rows,
                                .dim = grad.size(1),
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
