#include "element.cuh"
#include "gather_rows.h"

namespace ep {
namespace {

constexpr int kWarpsPerBlock = 8;

// One warp makes one row: lane i moves packs i, i + 32, ..., so with 16-byte packs each step of the warp
// reads 512 contiguous bytes. Without weights packs are moved and not looked into. Rows are independent,
// hence no shared memory and no synchronisation.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_rows / kWarpsPerBlock).
template <typename T, int kWidth>
__global__ void gather_rows_kernel(const Pack<T, kWidth>* __restrict__ x,  // [any], rows of row_packs
                                   const int32_t* __restrict__ row,        // [num_rows]
                                   const float* __restrict__ weight,       // [num_rows], or null
                                   Pack<T, kWidth>* __restrict__ out,      // [num_rows], likewise
                                   int64_t num_rows,
                                   int64_t row_packs,
                                   int64_t x_stride,      // packs from one row to the next
                                   int64_t out_stride) {  // likewise
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (n >= num_rows || row[n] < 0) return;

  const Pack<T, kWidth>* src = x + row[n] * x_stride;
  Pack<T, kWidth>* dst = out + n * out_stride;
  if (weight == nullptr) {
    for (int64_t p = threadIdx.x; p < row_packs; p += kWarpSize) dst[p] = src[p];
    return;
  }
  const float scale = weight[n];
  for (int64_t p = threadIdx.x; p < row_packs; p += kWarpSize) {
    Pack<T, kWidth> pack = src[p];
    for (T& value : pack.values) value = narrow<T>(__fmul_rn(scale, widen(value)));
    dst[p] = pack;
  }
}

}  // namespace

cudaError_t gather_rows_cuda(const GatherRowsArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  const dim3 block(kWarpSize, kWarpsPerBlock);
  const auto grid = static_cast<unsigned>((args.num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
  const Rows x{args.x, args.x_stride}, out{args.out, args.out_stride};
  with_pack(args.type, args.dim, {x, out}, [&]<typename T, int kWidth>(Pack<T, kWidth>) {
    gather_rows_kernel<T, kWidth><<<grid, block, 0, stream>>>(static_cast<const Pack<T, kWidth>*>(args.x),
                                                              args.row,
                                                              args.weight,
                                                              static_cast<Pack<T, kWidth>*>(args.out),
                                                              args.num_rows,
                                                              args.dim / kWidth,
                                                              args.x_stride / kWidth,
                                                              args.out_stride / kWidth);
  });
  return cudaGetLastError();
}

}  // namespace ep
