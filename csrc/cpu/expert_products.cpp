#include "expert_products.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "gather_rows.h"
#include "swiglu.h"

namespace ep {
namespace {

// Memory of a thread that it uses again for the next expert: new memory costs more than filling it.
class Scratch {
 public:
  void* get(int64_t bytes) {
    const auto lines = static_cast<size_t>(bytes / kLine + 1);
    if (lines_.size() < lines) lines_.resize(lines);
    return lines_.data();
  }

 private:
  static constexpr int64_t kLine = 64;
  struct alignas(kLine) Line {
    char bytes[kLine];
  };
  std::vector<Line> lines_;
};

thread_local Scratch scratch_x, scratch_grad, scratch_grad_hidden, scratch_gate_up, scratch_hidden;

// The copies of one expert, and the parts of all matrices that are theirs.
class Expert {
 public:
  Expert(const ExpertsArgs& args, int64_t slot, int64_t first)
      : args_(args), slot_(slot), first_(first), count_(args.copies_of_slot[slot]) {}

  int64_t count() const { return count_; }
  int64_t width() const { return args_.width; }

  // These copies of a matrix with one row for each.
  Matrix copies(const void* data, int64_t columns) const {
    return matrix(part(data, first_ * columns), columns);
  }

  Matrix in_scratch(Scratch& scratch, int64_t columns) const {
    return matrix(scratch.get(count_ * columns * element_size()), columns);
  }

  Matrix gathered(const void* rows, int64_t stride, Scratch& scratch) const {
    const Matrix out = in_scratch(scratch, args_.dim);
    gather_rows_cpu({.x = rows,
                     .row = args_.copy_row + first_,
                     .weight = nullptr,
                     .out = const_cast<void*>(out.data),
                     .num_rows = count_,
                     .dim = args_.dim,
                     .x_stride = stride,
                     .out_stride = args_.dim,
                     .streaming = false,
                     .type = args_.type},
                    0,
                    count_);
    return out;
  }

  Matrix gate_up_of(const void* weights) const { return weight(weights, 2 * args_.width, args_.dim); }
  Matrix down_of(const void* weights) const { return weight(weights, args_.dim, args_.width); }

  void zero(const Matrix& weight) const {
    std::fill_n(
        static_cast<char*>(const_cast<void*>(weight.data)), weight.rows * weight.columns * element_size(), 0);
  }

  const float* weights() const { return args_.weight + first_; }
  float* grad_weights() const { return args_.grad_weight + first_; }

 private:
  int64_t element_size() const { return args_.type == ElementType::kFloat32 ? 4 : 2; }
  const void* part(const void* data, int64_t elements) const {
    return static_cast<const char*>(data) + elements * element_size();
  }
  Matrix matrix(const void* data, int64_t columns) const { return {data, count_, columns, columns, 1}; }
  Matrix weight(const void* weights, int64_t rows, int64_t columns) const {
    return {part(weights, slot_ * rows * columns), rows, columns, columns, 1};
  }

  const ExpertsArgs& args_;
  int64_t slot_, first_, count_;
};

Matrix transposed(const Matrix& m) { return {m.data, m.columns, m.rows, m.column_stride, m.row_stride}; }

// Calls work(expert) for every slot, side by side. The largest first, so that the last thread does not start
// on a large one.
template <typename Work>
void for_each_expert(const ExpertsArgs& args, const ParallelFor& parallel_for, const Work& work) {
  std::vector<int64_t> first(args.num_slots), order(args.num_slots);
  std::exclusive_scan(args.copies_of_slot, args.copies_of_slot + args.num_slots, first.begin(), int64_t{0});
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return args.copies_of_slot[a] > args.copies_of_slot[b];
  });
  std::atomic<int64_t> next = 0;
  // At least two, because one would be called outside of a parallel region, where a product takes all
  // threads.
  parallel_for(std::max<int64_t>(args.num_slots, 2), [&](int64_t, int64_t) {
    for (int64_t i = next++; i < args.num_slots; i = next++) work(Expert(args, order[i], first[order[i]]));
  });
}

void weight_grads(const ExpertsArgs& args,
                  const Expert& expert,
                  const Matrix& grad,
                  const Matrix& grad_gate_up,
                  const Matrix& hidden,
                  const Multiply& multiply) {
  const Matrix of_gate_up = expert.gate_up_of(args.grad_w_gate_up),
               of_down = expert.down_of(args.grad_w_down);
  if (expert.count() == 0) {
    expert.zero(of_gate_up);
    expert.zero(of_down);
    return;
  }
  multiply(transposed(grad), hidden, of_down);
  multiply(transposed(grad_gate_up), expert.gathered(args.x, args.x_stride, scratch_x), of_gate_up);
}

}  // namespace

void experts_forward_cpu(const ExpertsArgs& args, const Multiply& multiply, const ParallelFor& parallel_for) {
  for_each_expert(args, parallel_for, [&](const Expert& expert) {
    if (expert.count() == 0) return;
    const Matrix gate_up = expert.copies(args.gate_up, 2 * args.width);
    multiply(expert.gathered(args.x, args.x_stride, scratch_x),
             transposed(expert.gate_up_of(args.w_gate_up)),
             gate_up);
    if (args.y == nullptr) return;
    const Matrix hidden = expert.in_scratch(scratch_hidden, args.width);
    swiglu_cpu({.gate_up = gate_up.data,
                .out = const_cast<void*>(hidden.data),
                .num_rows = expert.count(),
                .dim = args.width,
                .type = args.type},
               0,
               expert.count());
    multiply(hidden, transposed(expert.down_of(args.w_down)), expert.copies(args.y, args.dim));
  });
}

void experts_backward_cpu(const ExpertsArgs& args,
                          const Multiply& multiply,
                          const ParallelFor& parallel_for) {
  const bool later = args.grad_w_down == nullptr;
  for_each_expert(args, parallel_for, [&](const Expert& expert) {
    const Matrix grad = expert.gathered(args.grad, args.grad_stride, scratch_grad);
    const Matrix grad_gate_up = later ? expert.copies(args.grad_gate_up, 2 * args.width)
                                      : expert.in_scratch(scratch_gate_up, 2 * args.width);
    const Matrix hidden =
        later ? expert.copies(args.hidden, args.width) : expert.in_scratch(scratch_hidden, args.width);
    if (expert.count() > 0) {
      const Matrix grad_hidden = expert.in_scratch(scratch_grad_hidden, args.width);
      multiply(grad, expert.down_of(args.w_down), grad_hidden);
      swiglu_backward_cpu({.grad = grad_hidden.data,
                           .gate_up = expert.copies(args.gate_up, 2 * args.width).data,
                           .weight = expert.weights(),
                           .grad_gate_up = const_cast<void*>(grad_gate_up.data),
                           .hidden = const_cast<void*>(hidden.data),
                           .grad_weight = expert.grad_weights(),
                           .num_rows = expert.count(),
                           .dim = args.width,
                           .type = args.type},
                          0,
                          expert.count());
      multiply(grad_gate_up, expert.gate_up_of(args.w_gate_up), expert.copies(args.grad_x, args.dim));
    }
    if (!later) weight_grads(args, expert, grad, grad_gate_up, hidden, multiply);
  });
}

void experts_weight_grads_cpu(const ExpertsArgs& args,
                              const Multiply& multiply,
                              const ParallelFor& parallel_for) {
  for_each_expert(args, parallel_for, [&](const Expert& expert) {
    const Matrix grad = expert.gathered(args.grad, args.grad_stride, scratch_grad);
    weight_grads(args,
                 expert,
                 grad,
                 expert.copies(args.grad_gate_up, 2 * args.width),
                 expert.copies(args.hidden, args.width),
                 multiply);
  });
}

}  // namespace ep
