#include "combine_rows.h"

#include <algorithm>
#include <vector>

#include "vectorise.h"

namespace ep {
namespace {

// The open groups on the way from the root to the last copy, each with the sum of its children so far.
template <typename T>
class Tree {
 public:
  Tree(const CombineRowsArgs& args) : args_(args), sums_(args.num_levels * args.dim), rounded_(args.dim) {}

  // `next` is the row that will be added after this one: it is fetched meanwhile, because rows lie anywhere.
  void add_copy(int32_t leaf, const T* y, float weight, const T* next) {
    if (open_[0]) {  // close the groups of the last copy that this one is not in
      for (int level = 0; level < args_.num_levels - 1; ++level) {
        if (leaf / args_.group_sizes[level] == last_leaf_ / args_.group_sizes[level]) break;
        close(level);
      }
    }
    float* __restrict sum = &sums_[0];
    constexpr int64_t kBlock = 512 / sizeof(T);
    for (int64_t first = 0; first < args_.dim; first += kBlock) {
      const int64_t last = std::min(args_.dim, first + kBlock);
      for (int64_t d = first; d < last; d += kLine) __builtin_prefetch(next + d);
      if (open_[0]) {
        for (int64_t d = first; d < last; ++d) sum[d] += weight * to_float(y[d]);
      } else {
        for (int64_t d = first; d < last; ++d) sum[d] = weight * to_float(y[d]);
      }
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
    T* __restrict row = args_.streaming ? rounded_.data() : out;
    for (int64_t d = 0; d < args_.dim; ++d) row[d] = from_float<T>(sum[d]);
    if (args_.streaming) stream_bytes(out, row, args_.dim * sizeof(T));
    std::fill_n(open_, kMaxTreeLevels, false);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

  void close(int level) {
    const float* child = &sums_[level * args_.dim];
    float* __restrict parent = &sums_[(level + 1) * args_.dim];
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
  std::vector<T> rounded_;   // [dim]
  bool open_[kMaxTreeLevels] = {};
  int32_t last_leaf_ = 0;
};

template <typename T>
void combine(const CombineRowsArgs& args, int64_t begin, int64_t end) {
  Tree<T> tree(args);
  const auto* y = static_cast<const T*>(args.y);
  const int64_t last = end * args.num_columns - 1;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = r * args.num_columns; c < (r + 1) * args.num_columns; ++c) {
      if (args.index[c] < 0) break;
      const int64_t next = args.index[c < last && args.index[c + 1] >= 0 ? c + 1 : c];
      const float weight = args.weight == nullptr ? 1.0f : args.weight[c];
      tree.add_copy(args.leaf[c], y + args.index[c] * args.y_stride, weight, y + next * args.y_stride);
    }
    tree.finish(static_cast<T*>(args.out) + r * args.out_stride);
  }
  finish_stream();
}

EP_VECTORISED void combine_float(const CombineRowsArgs& args, int64_t begin, int64_t end) {
  combine<float>(args, begin, end);
}

EP_VECTORISED void combine_bfloat16(const CombineRowsArgs& args, int64_t begin, int64_t end) {
  combine<BFloat16>(args, begin, end);
}

}  // namespace

void combine_rows_cpu(const CombineRowsArgs& args, int64_t begin, int64_t end) {
  (args.type == ElementType::kFloat32 ? combine_float : combine_bfloat16)(args, begin, end);
}

}  // namespace ep
