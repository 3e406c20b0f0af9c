// Torch side of expert_products: check, and multiply with torch's own products.
#include "expert_products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <numeric>

#include "tensor.h"

namespace ep {
namespace {

using MaybeTensor = std::optional<Tensor>;

// A matrix as a tensor that does not own its memory.
Tensor as_tensor(const Matrix& matrix, int32_t dtype) {
  const int64_t sizes[] = {matrix.rows, matrix.columns},
                strides[] = {matrix.row_stride, matrix.column_stride};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<void*>(matrix.data), 2, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// One thread each, because it is called inside of a parallel region.
Multiply multiply(ElementType type) {
  const int32_t dtype =
      type == ElementType::kFloat32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  return [dtype](const Matrix& a, const Matrix& b, const Matrix& out) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(
        as_tensor(out, dtype).get(), as_tensor(a, dtype).get(), as_tensor(b, dtype).get()));
  };
}

void on_threads(int64_t count, const Range& range) { torch::stable::parallel_for(0, count, 1, range); }

void* stacked(
    const Tensor& tensor, const char* name, int64_t num, int64_t num_rows, int64_t dim, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.is_contiguous() && tensor.scalar_type() == x.scalar_type() &&
                      tensor.size(0) == num && tensor.size(1) == num_rows && tensor.size(2) == dim,
                  name,
                  " must be contiguous, in the dtype of x, and (",
                  num,
                  ", ",
                  num_rows,
                  ", ",
                  dim,
                  ")");
  return tensor.mutable_data_ptr();
}

// What all three ops are given; `num_copies` of the matrices that have a row for each.
ExpertsArgs shared_args(const Tensor& x,
                        const Tensor& copy_row,
                        const Tensor& copies_of_slot,
                        int64_t num_copies,
                        int64_t width) {
  STD_TORCH_CHECK(x.dim() == 2, "experts: x must be a matrix of rows");
  const int64_t dim = x.size(1), num_slots = copies_of_slot.numel();
  const auto* copies = data<int32_t>(copies_of_slot, "copies_of_slot", num_slots, x);
  STD_TORCH_CHECK(
      std::accumulate(copies, copies + num_slots, int64_t{0}) == num_copies && copy_row.numel() >= num_copies,
      "experts: copies_of_slot must sum to the ",
      num_copies,
      " rows of the matrices, and copy_row name as many");
  ExpertsArgs args{};
  args.x = rows(x, "x", -1, dim, x);
  args.copy_row = data<int32_t>(copy_row, "copy_row", copy_row.numel(), x);
  args.copies_of_slot = copies;
  args.x_stride = row_stride(x);
  args.num_slots = num_slots;
  args.dim = dim;
  args.width = width;
  args.type = element_type(x);
  return args;
}

void set_weights(ExpertsArgs& args, const Tensor& w_gate_up, const Tensor& w_down, const Tensor& x) {
  args.w_gate_up = stacked(w_gate_up, "w_gate_up", args.num_slots, 2 * args.width, args.dim, x);
  args.w_down = stacked(w_down, "w_down", args.num_slots, args.dim, args.width, x);
}

void set_grad(ExpertsArgs& args, const Tensor& grad, const Tensor& x) {
  args.grad = rows(grad, "grad", x.size(0), args.dim, x);
  args.grad_stride = row_stride(grad);
}

// What is kept of the backward for weight gradients that come later.
void set_inside(ExpertsArgs& args, const Tensor& grad_gate_up, const Tensor& hidden, const Tensor& x) {
  args.grad_gate_up = whole(grad_gate_up, "grad_gate_up", hidden.size(0), 2 * args.width, x);
  args.hidden = whole(hidden, "hidden", hidden.size(0), args.width, x);
}

void set_weight_grads(ExpertsArgs& args, const Tensor& of_gate_up, const Tensor& of_down, const Tensor& x) {
  args.grad_w_gate_up = stacked(of_gate_up, "grad_w_gate_up", args.num_slots, 2 * args.width, args.dim, x);
  args.grad_w_down = stacked(of_down, "grad_w_down", args.num_slots, args.dim, args.width, x);
}

void experts_forward(const Tensor& x,
                     const Tensor& copy_row,
                     const Tensor& copies_of_slot,
                     const Tensor& w_gate_up,
                     const Tensor& w_down,
                     const Tensor& gate_up,
                     const MaybeTensor& y) {
  const int64_t num_copies = gate_up.size(0), width = w_down.size(2);
  ExpertsArgs args = shared_args(x, copy_row, copies_of_slot, num_copies, width);
  set_weights(args, w_gate_up, w_down, x);
  args.gate_up = whole(gate_up, "gate_up", num_copies, 2 * width, x);
  if (y) args.y = whole(*y, "y", num_copies, args.dim, x);
  experts_forward_cpu(args, multiply(args.type), on_threads);
}

void experts_backward(const Tensor& grad,
                      const Tensor& x,
                      const Tensor& copy_row,
                      const Tensor& copies_of_slot,
                      const Tensor& w_gate_up,
                      const Tensor& w_down,
                      const Tensor& gate_up,
                      const Tensor& weight,
                      const Tensor& grad_x,
                      const Tensor& grad_weight,
                      const MaybeTensor& grad_gate_up,
                      const MaybeTensor& hidden,
                      const MaybeTensor& grad_w_gate_up,
                      const MaybeTensor& grad_w_down) {
  const int64_t num_copies = grad_x.size(0), width = w_down.size(2);
  ExpertsArgs args = shared_args(x, copy_row, copies_of_slot, num_copies, width);
  STD_TORCH_CHECK(grad_gate_up.has_value() == hidden.has_value() &&
                      grad_w_gate_up.has_value() == grad_w_down.has_value() &&
                      hidden.has_value() != grad_w_down.has_value(),
                  "experts_backward: give room for the weight gradients, or for what they need later");
  set_weights(args, w_gate_up, w_down, x);
  args.gate_up = whole(gate_up, "gate_up", num_copies, 2 * width, x);
  set_grad(args, grad, x);
  args.weight = data<float>(weight, "weight", num_copies, x);
  args.grad_x = whole(grad_x, "grad_x", num_copies, args.dim, x);
  args.grad_weight = data<float>(grad_weight, "grad_weight", num_copies, x);
  if (hidden) {
    STD_TORCH_CHECK(hidden->size(0) == num_copies, "experts_backward: hidden must have a row for each copy");
    set_inside(args, *grad_gate_up, *hidden, x);
  } else {
    set_weight_grads(args, *grad_w_gate_up, *grad_w_down, x);
  }
  experts_backward_cpu(args, multiply(args.type), on_threads);
}

void experts_weight_grads(const Tensor& grad,
                          const Tensor& x,
                          const Tensor& copy_row,
                          const Tensor& copies_of_slot,
                          const Tensor& grad_gate_up,
                          const Tensor& hidden,
                          const Tensor& grad_w_gate_up,
                          const Tensor& grad_w_down) {
  ExpertsArgs args = shared_args(x, copy_row, copies_of_slot, hidden.size(0), hidden.size(1));
  set_grad(args, grad, x);
  set_inside(args, grad_gate_up, hidden, x);
  set_weight_grads(args, grad_w_gate_up, grad_w_down, x);
  experts_weight_grads_cpu(args, multiply(args.type), on_threads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) {
  m.impl("experts_forward", TORCH_BOX(&experts_forward));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
  m.impl("experts_weight_grads", TORCH_BOX(&experts_weight_grads));
}

}  // namespace ep
