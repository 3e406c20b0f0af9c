#include <cuda_fp8.h>

#include <algorithm>

#include "fp8_rows.h"
#include "warp.cuh"

namespace ep {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr float kLargest = 448.0f;  // of e4m3

// How a warp takes pieces of a row: each lane kSteps packs of kWidth elements, kLanes lanes an fp8 block.
template <int kWidth>
struct Piece {
  static constexpr int kLanes = std::min<int>(kWarpSize, kFp8Block / kWidth);
  static constexpr int kSteps = kFp8Block / kWidth / kLanes;
  static constexpr int kBlocks = kWarpSize / kLanes;
  static constexpr int64_t kElements = kBlocks * kFp8Block;
};

// One block quantises one row, each of its warps one piece after the other, so with 16-byte packs a step of a
// warp reads 512 contiguous bytes. Lanes keep their elements in registers and find the largest magnitude by
// shuffles, hence no shared memory and no synchronisation. Magnitudes are compared as bits, which order like
// them and keep a NaN.
//
// Block (kWarpSize, as many warps as a row has pieces, at most kWarpsPerBlock); grid num_rows.
template <typename T, int kWidth>
__global__ void quantise_rows_kernel(const QuantiseRowsArgs args) {
  using P = Piece<kWidth>;
  const int64_t n = blockIdx.x;
  if (args.row[n] < 0) return;

  const T* x = static_cast<const T*>(args.x) + args.row[n] * args.x_stride;
  uint8_t* values = args.values + n * args.values_stride;
  const int lane = threadIdx.x % P::kLanes;
  // All lanes of a warp take part in every round, because they talk by shuffles.
  for (int64_t piece = threadIdx.y; piece * P::kElements < args.dim; piece += blockDim.y) {
    const int64_t block = piece * P::kBlocks + threadIdx.x / P::kLanes;
    const int64_t first = block * kFp8Block + lane * kWidth;  // of this lane's elements
    Pack<T, kWidth> mine[P::kSteps] = {};
    unsigned largest = 0;
    for (int step = 0; step < P::kSteps; ++step) {
      const int64_t d = first + step * P::kLanes * kWidth;
      if (d < args.dim) mine[step] = *reinterpret_cast<const Pack<T, kWidth>*>(x + d);
      for (const T value : mine[step].values) {
        largest = max(largest, __float_as_uint(widen(value)) & 0x7fffffffu);
      }
    }
    largest = warp_max<P::kLanes>(largest);
    const float quotient = __fdiv_rn(__uint_as_float(largest), kLargest);
    const float scale = quotient == 0.0f ? 1.0f : quotient;  // also where it is too small for a float
    for (int step = 0; step < P::kSteps; ++step) {
      const int64_t d = first + step * P::kLanes * kWidth;
      if (d >= args.dim) continue;
      Pack<uint8_t, kWidth> codes;
      for (int i = 0; i < kWidth; ++i) {
        const float value = __fdiv_rn(widen(mine[step].values[i]), scale);
        codes.values[i] = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
      }
      *reinterpret_cast<Pack<uint8_t, kWidth>*>(values + d) = codes;
    }
    if (lane == 0 && first < args.dim) args.scales[n * args.scales_stride + block] = scale;
  }
}

// One block reads one row, thread i packs i, i + threads, ...; a pack lies in one fp8 block. Threads are
// independent, hence no synchronisation.
//
// Block (kWarpSize, as many warps as the packs of a row fill, at most kWarpsPerBlock); grid num_rows.
template <typename T, int kWidth>
__global__ void dequantise_rows_kernel(const DequantiseRowsArgs args) {
  const int64_t n = blockIdx.x;
  const auto* values = reinterpret_cast<const Pack<uint8_t, kWidth>*>(args.values + n * args.values_stride);
  const float* scales = args.scales + n * args.scales_stride;
  auto* out = reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(args.out) + n * args.dim);
  const int64_t threads = kWarpSize * blockDim.y;
  for (int64_t p = threadIdx.y * kWarpSize + threadIdx.x; p < args.dim / kWidth; p += threads) {
    const Pack<uint8_t, kWidth> codes = values[p];
    const float scale = scales[p * kWidth / kFp8Block];
    Pack<T, kWidth> result;
    for (int i = 0; i < kWidth; ++i) {
      __nv_fp8_e4m3 value;
      value.__x = codes.values[i];
      result.values[i] = narrow<T>(__fmul_rn(static_cast<float>(value), scale));
    }
    out[p] = result;
  }
}

// Enough warps for `count` parts of a row.
dim3 block_for(int64_t count) {
  return dim3(kWarpSize, static_cast<unsigned>(std::clamp<int64_t>(count, 1, kWarpsPerBlock)));
}

}  // namespace

// with_pack looks at strides as if they were of T: a multiple of kWidth bytes is what a pack of values needs.
cudaError_t quantise_rows_cuda(const QuantiseRowsArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  const auto grid = static_cast<unsigned>(args.num_rows);
  const Rows x{args.x, args.x_stride}, values{args.values, args.values_stride};
  with_pack(args.type, args.dim, {x, values}, [&]<typename T, int kWidth>(Pack<T, kWidth>) {
    const int64_t pieces = (args.dim + Piece<kWidth>::kElements - 1) / Piece<kWidth>::kElements;
    quantise_rows_kernel<T, kWidth><<<grid, block_for(pieces), 0, stream>>>(args);
  });
  return cudaGetLastError();
}

cudaError_t dequantise_rows_cuda(const DequantiseRowsArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error

  const auto grid = static_cast<unsigned>(args.num_rows);
  const Rows out{args.out, args.dim}, values{args.values, args.values_stride};
  with_pack(args.type, args.dim, {out, values}, [&]<typename T, int kWidth>(Pack<T, kWidth>) {
    const int64_t warps = (args.dim / kWidth + kWarpSize - 1) / kWarpSize;
    dequantise_rows_kernel<T, kWidth><<<grid, block_for(warps), 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace ep
