#include <algorithm>

#include "combine_rows.h"
#include "element.cuh"

namespace ep {
namespace {

constexpr int kWarpsPerBlock = 8;
// Deeper trees cost registers: with 8 levels of 8 columns an SM has room for one block only.
constexpr int kUsualTreeLevels = 4;

// The open groups on the way from the root to the last copy, each with the sum of its children so far, for
// kWidth neighbouring columns. All indices are known when loops are unrolled, so the sums stay in registers.
template <typename T, int kWidth, int kLevels>
class Tree {
 public:
  // Closes the groups of levels [0, num_levels): each is rounded and added to the group around it.
  __device__ void close(int num_levels) {
#pragma unroll
    for (int level = 0; level < kLevels - 1; ++level) {
      if (level >= num_levels) break;
      float child[kWidth];
      for (int i = 0; i < kWidth; ++i) child[i] = widen(narrow<T>(sums_[level][i]));
      add(level + 1, child);
      open_ &= ~(1u << level);
    }
  }

  __device__ void add_copy(const Pack<T, kWidth>& y, float weight) {
    float child[kWidth];
    for (int i = 0; i < kWidth; ++i) child[i] = __fmul_rn(weight, widen(y.values[i]));
    add(0, child);
  }

  // Levels above the last one in use change nothing: a sum that is rounded already is rounded again.
  __device__ Pack<T, kWidth> finish() {
    Pack<T, kWidth> out;
    const bool empty = open_ == 0;
    close(kLevels - 1);
    for (int i = 0; i < kWidth; ++i) out.values[i] = narrow<T>(empty ? 0.0f : sums_[kLevels - 1][i]);
    return out;
  }

 private:
  __device__ void add(int level, const float (&child)[kWidth]) {
    const bool open = open_ >> level & 1;
    for (int i = 0; i < kWidth; ++i) sums_[level][i] = open ? __fadd_rn(sums_[level][i], child[i]) : child[i];
    open_ |= 1u << level;
  }

  float sums_[kLevels][kWidth];
  unsigned open_ = 0;  // a bit for each level whose group has a child
};

// What the walk must know of one copy.
struct Copy {
  int32_t row;  // of y, or -1
  int32_t leaf;
  float weight;
  int closes;  // groups that the copy before it is in and it is not, counted from the innermost level
};

// Lane i gets copy first + i of row r. `last_leaf` is that of copy first - 1, or -1 if there is none.
__device__ Copy load_copy(const CombineRowsArgs& args, int64_t r, int64_t first, int32_t last_leaf) {
  const int lane = threadIdx.x % kWarpSize;
  Copy copy{.row = -1, .leaf = -1, .weight = 1.0f, .closes = 0};
  if (first + lane < args.num_columns) {
    const int64_t c = r * args.num_columns + first + lane;
    copy.row = args.index[c];
    copy.leaf = args.leaf[c];
    if (args.weight != nullptr) copy.weight = args.weight[c];
  }
  int32_t before = __shfl_up_sync(kAllLanes, copy.leaf, 1);
  if (lane == 0) before = last_leaf;
  if (copy.row < 0 || before < 0) return copy;
  while (copy.closes < args.num_levels - 1 &&
         copy.leaf / args.group_sizes[copy.closes] != before / args.group_sizes[copy.closes]) {
    ++copy.closes;
  }
  return copy;
}

// One block makes one row, a thread sums kWidth neighbouring columns, so a step of a warp reads contiguous
// bytes. The copies are looked at by the lanes of a warp side by side, 32 at a time, and then walked by all
// lanes together, one after the other: the order of additions is that of the CPU. No thread needs what
// another warp has, hence no shared memory and no synchronisation.
//
// Block: as many warps as the packs of a row fill, at most kWarpsPerBlock; grid num_rows.
template <typename T, int kWidth, int kLevels>
__global__ void combine_rows_kernel(const CombineRowsArgs args) {
  const auto* y = static_cast<const Pack<T, kWidth>*>(args.y);
  auto* out = static_cast<Pack<T, kWidth>*>(args.out);
  const int64_t row_packs = args.dim / kWidth;
  const int64_t y_stride = args.y_stride / kWidth, out_stride = args.out_stride / kWidth;  // in packs
  const int64_t r = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize;

  // All lanes of a warp take part in every round, because they talk by shuffles.
  for (int64_t begin = threadIdx.x - lane; begin < row_packs; begin += blockDim.x) {
    const int64_t p = begin + lane;
    Tree<T, kWidth, kLevels> tree;
    int32_t last_leaf = -1;
    for (int64_t first = 0; first < args.num_columns; first += kWarpSize) {
      const Copy copy = load_copy(args, r, first, last_leaf);
      const unsigned absent = __ballot_sync(kAllLanes, copy.row < 0);
      const int num_copies = absent == 0 ? kWarpSize : __ffs(absent) - 1;
      for (int c = 0; c < num_copies; ++c) {
        const int64_t row = __shfl_sync(kAllLanes, copy.row, c);
        const float weight = __shfl_sync(kAllLanes, copy.weight, c);
        const int closes = __shfl_sync(kAllLanes, copy.closes, c);
        if (p >= row_packs) continue;
        const Pack<T, kWidth> pack = y[row * y_stride + p];
        tree.close(closes);
        tree.add_copy(pack, weight);
      }
      if (absent != 0) break;
      last_leaf = __shfl_sync(kAllLanes, copy.leaf, kWarpSize - 1);
    }
    if (p < row_packs) out[r * out_stride + p] = tree.finish();
  }
}

}  // namespace

cudaError_t combine_rows_cuda(const CombineRowsArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  const Rows y{args.y, args.y_stride}, out{args.out, args.out_stride};
  with_pack(args.type, args.dim, {y, out}, [&]<typename T, int kWidth>(Pack<T, kWidth>) {
    const int64_t row_packs = args.dim / kWidth;
    const int64_t warps = std::clamp<int64_t>((row_packs + kWarpSize - 1) / kWarpSize, 1, kWarpsPerBlock);
    const auto grid = static_cast<unsigned>(args.num_rows), block = static_cast<unsigned>(warps * kWarpSize);
    if (args.num_levels <= kUsualTreeLevels) {
      combine_rows_kernel<T, kWidth, kUsualTreeLevels><<<grid, block, 0, stream>>>(args);
    } else {
      combine_rows_kernel<T, kWidth, kMaxTreeLevels><<<grid, block, 0, stream>>>(args);
    }
  });
  return cudaGetLastError();
}

}  // namespace ep
