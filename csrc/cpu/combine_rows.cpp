#include "combine_rows.h"

#include <algorithm>
#include <vector>

#include "dot.h"

namespace ep {
namespace {

// The open groups on the way from the root to the last copy, each with the sum of its children so far.
template <typename T>
class Tree {
 public:
  Tree(const CombineRowsArgs& args) : args_(args), sums_(args.num_levels * args.dim) {}

  void add_copy(int32_t leaf, const T* y, float weight) {
    if (open_[0]) {  // close the groups of the last copy that this one is not in
      for (int level = 0; level < args_.num_levels - 1; ++level) {
        if (leaf / args_.group_sizes[level] == last_leaf_ / args_.group_sizes[level]) break;
        close(level);
      }
    }
    float* sum = &sums_[0];
    if (open_[0]) {
      for (int64_t d = 0; d < args_.dim; ++d) sum[d] += weight * to_float(y[d]);
    } else {
      for (int64_t d = 0; d < args_.dim; ++d) sum[d] = weight * to_float(y[d]);
    }
    open_[0] = true;
    last_leaf_ = leaf;
  }

  void finish(T* out) {
    if (!open_[0]) {
      std::fill_n(out, args_.dim, T{});
      return;
    }
    for (int level = 0; level < args_.num_levels - 1; ++level) close(level);
    const float* sum = &sums_[(args_.num_levels - 1) * args_.dim];
    for (int64_t d = 0; d < args_.dim; ++d) out[d] = from_float<T>(sum[d]);
    std::fill_n(open_, kMaxTreeLevels, false);
  }

 private:
  void close(int level) {
    const float* child = &sums_[level * args_.dim];
    float* parent = &sums_[(level + 1) * args_.dim];
    if (open_[level + 1]) {
      for (int64_t d = 0; d < args_.dim; ++d) parent[d] += rounded<T>(child[d]);
    } else {
      for (int64_t d = 0; d < args_.dim; ++d) parent[d] = rounded<T>(child[d]);
    }
    open_[level] = false;
    open_[level + 1] = true;
  }

  const CombineRowsArgs& args_;
  std::vector<float> sums_;  // [num_levels, dim]
  bool open_[kMaxTreeLevels] = {};
  int32_t last_leaf_ = 0;
};

template <typename T>
void combine(const CombineRowsArgs& args, int64_t begin, int64_t end) {
  Tree<T> tree(args);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = r * args.num_columns; c < (r + 1) * args.num_columns; ++c) {
      if (args.index[c] < 0) break;
      const T* y = static_cast<const T*>(args.y) + args.index[c] * args.dim;
      tree.add_copy(args.leaf[c], y, args.weight == nullptr ? 1.0f : args.weight[c]);
    }
    tree.finish(static_cast<T*>(args.out) + r * args.dim);
  }
}

template <typename T>
void weight_grad(const CombineRowsWeightGradArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* grad = static_cast<const T*>(args.grad_out) + r * args.dim;
    for (int64_t c = r * args.num_columns; c < (r + 1) * args.num_columns; ++c) {
      const T* y = static_cast<const T*>(args.y) + args.index[c] * args.dim;
      args.grad_weight[c] = args.index[c] < 0 ? 0.0f : dot(grad, y, args.dim);
    }
  }
}

}  // namespace

void combine_rows_cpu(const CombineRowsArgs& args, int64_t begin, int64_t end) {
  if (args.type == ElementType::kFloat32) {
    combine<float>(args, begin, end);
  } else {
    combine<BFloat16>(args, begin, end);
  }
}

void combine_rows_weight_grad_cpu(const CombineRowsWeightGradArgs& args, int64_t begin, int64_t end) {
  if (args.type == ElementType::kFloat32) {
    weight_grad<float>(args, begin, end);
  } else {
    weight_grad<BFloat16>(args, begin, end);
  }
}

}  // namespace ep
