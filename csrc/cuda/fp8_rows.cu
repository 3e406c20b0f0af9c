#include <cuda_fp8.h>

#include "fp8_rows.h"
#include "warp.cuh"

namespace ep {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr float kLargest = 448.0f;  // of e4m3
constexpr int kPerLane = kFp8Block / kWarpSize;

// One warp writes one block of one row: each lane keeps its elements in registers, the largest magnitude is
// found by shuffles, hence no shared memory and no synchronisation. Magnitudes are compared as bits, which
// order like them and keep a NaN.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_rows * blocks of a row / kWarpsPerBlock).
template <typename T>
__global__ void quantise_rows_kernel(const QuantiseRowsArgs args) {
  const int64_t blocks = (args.dim + kFp8Block - 1) / kFp8Block;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  const int64_t n = index / blocks, block = index % blocks;
  if (n >= args.num_rows || args.row[n] < 0) return;

  const T* x = static_cast<const T*>(args.x) + args.row[n] * args.x_stride;
  float mine[kPerLane];
  unsigned largest = 0;
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t d = block * kFp8Block + i * kWarpSize + threadIdx.x;
    mine[i] = d < args.dim ? widen(x[d]) : 0.0f;
    largest = max(largest, __float_as_uint(mine[i]) & 0x7fffffffu);
  }
  largest = warp_max(largest);
  const float scale = largest == 0 ? 1.0f : __fdiv_rn(__uint_as_float(largest), kLargest);
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t d = block * kFp8Block + i * kWarpSize + threadIdx.x;
    if (d >= args.dim) continue;
    args.values[n * args.values_stride + d] =
        __nv_cvt_float_to_fp8(__fdiv_rn(mine[i], scale), __NV_SATFINITE, __NV_E4M3);
  }
  if (threadIdx.x == 0) args.scales[n * args.scales_stride + block] = scale;
}

// One warp reads one row, lane i elements i, i + 32, ...; rows are independent.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_rows / kWarpsPerBlock).
template <typename T>
__global__ void dequantise_rows_kernel(const DequantiseRowsArgs args) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (n >= args.num_rows) return;

  T* out = static_cast<T*>(args.out) + n * args.dim;
  for (int64_t d = threadIdx.x; d < args.dim; d += kWarpSize) {
    __nv_fp8_e4m3 value;
    value.__x = args.values[n * args.values_stride + d];
    const float scale = args.scales[n * args.scales_stride + d / kFp8Block];
    out[d] = narrow<T>(__fmul_rn(static_cast<float>(value), scale));
  }
}

unsigned blocks_for(int64_t warps) {
  return static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

}  // namespace

cudaError_t quantise_rows_cuda(const QuantiseRowsArgs& args, cudaStream_t stream) {
  const int64_t warps = args.num_rows * fp8_blocks(args.dim);
  if (warps == 0) return cudaSuccess;  // an empty grid is a launch error

  const dim3 block(kWarpSize, kWarpsPerBlock);
  if (args.type == ElementType::kFloat32) {
    quantise_rows_kernel<float><<<blocks_for(warps), block, 0, stream>>>(args);
  } else {
    quantise_rows_kernel<__nv_bfloat16><<<blocks_for(warps), block, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t dequantise_rows_cuda(const DequantiseRowsArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  const dim3 block(kWarpSize, kWarpsPerBlock);
  if (args.type == ElementType::kFloat32) {
    dequantise_rows_kernel<float><<<blocks_for(args.num_rows), block, 0, stream>>>(args);
  } else {
    dequantise_rows_kernel<__nv_bfloat16><<<blocks_for(args.num_rows), block, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace ep
