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
__global__ void combine_rows_kernel(const CombineRowsArgs args, int64_t row_packs) {
  const auto* y = static_cast<const Pack<T, kWidth>*>(args.y);
  auto* out = static_cast<Pack<T, kWidth>*>(args.out);
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
        const Pack<T, kWidth> pack = y[row * row_packs + p];
        tree.close(closes);
        tree.add_copy(pack, weight);
      }
      if (absent != 0) break;
      last_leaf = __shfl_sync(kAllLanes, copy.leaf, kWarpSize - 1);
    }
    if (p < row_packs) out[r * row_packs + p] = tree.finish();
  }
}

// One warp makes one inner product. Lane i sums packs i, i + 32, ... and the lanes are added in pairs: a
// fixed order, so the result is the same from run to run. Lanes talk by shuffles only, hence no shared
// memory.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_rows * num_columns / kWarpsPerBlock).
template <typename T, int kWidth>
__global__ void weight_grad_kernel(const CombineRowsWeightGradArgs args, int64_t row_packs) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (c >= args.num_rows * args.num_columns) return;

  float sum = 0.0f;
  if (args.index[c] >= 0) {
    const auto* grad = static_cast<const Pack<T, kWidth>*>(args.grad_out) + c / args.num_columns * row_packs;
    const auto* y = static_cast<const Pack<T, kWidth>*>(args.y) + args.index[c] * row_packs;
    for (int64_t p = threadIdx.x; p < row_packs; p += kWarpSize) {
      const Pack<T, kWidth> a = grad[p], b = y[p];
      for (int i = 0; i < kWidth; ++i) sum = __fmaf_rn(widen(a.values[i]), widen(b.values[i]), sum);
    }
  }
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  if (threadIdx.x == 0) args.grad_weight[c] = sum;
}

}  // namespace

cudaError_t combine_rows_cuda(const CombineRowsArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  with_pack(args.type, args.dim, {args.y, args.out}, [&]<typename T, int kWidth>(Pack<T, kWidth>) {
    const int64_t row_packs = args.dim / kWidth;
    const int64_t warps = std::clamp<int64_t>((row_packs + kWarpSize - 1) / kWarpSize, 1, kWarpsPerBlock);
    const auto grid = static_cast<unsigned>(args.num_rows), block = static_cast<unsigned>(warps * kWarpSize);
    if (args.num_levels <= kUsualTreeLevels) {
      combine_rows_kernel<T, kWidth, kUsualTreeLevels><<<grid, block, 0, stream>>>(args, row_packs);
    } else {
      combine_rows_kernel<T, kWidth, kMaxTreeLevels><<<grid, block, 0, stream>>>(args, row_packs);
    }
  });
  return cudaGetLastError();
}

cudaError_t combine_rows_weight_grad_cuda(const CombineRowsWeightGradArgs& args, cudaStream_t stream) {
  const int64_t count = args.num_rows * args.num_columns;
  if (count == 0) return cudaSuccess;  // an empty grid is a launch error

  const dim3 block(kWarpSize, kWarpsPerBlock);
  const auto grid = static_cast<unsigned>((count + kWarpsPerBlock - 1) / kWarpsPerBlock);
  with_pack(args.type, args.dim, {args.grad_out, args.y}, [&]<typename T, int kWidth>(Pack<T, kWidth>) {
    weight_grad_kernel<T, kWidth><<<grid, block, 0, stream>>>(args, args.dim / kWidth);
  });
  return cudaGetLastError();
}

}  // namespace ep
