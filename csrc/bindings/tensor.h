// What every binding needs of torch: checked pointers, element types, the current stream. No arithmetic.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "element.h"
#include "parallel_for.h"

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct ScalarTypeOf;
template <>
struct ScalarTypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct ScalarTypeOf<int32_t> {
  static constexpr ScalarType value = ScalarType::Int;
};
template <>
struct ScalarTypeOf<uint8_t> {
  static constexpr ScalarType value = ScalarType::Byte;
};
template <>
struct ScalarTypeOf<int64_t> {
  static constexpr ScalarType value = ScalarType::Long;
};

// Memory of a contiguous tensor of `count` elements of type T on the device of `like`.
template <typename T>
T* data(const Tensor& tensor, const char* name, int64_t count, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarTypeOf<T>::value,
                  name,
                  " must be contiguous and of the dtype that its op documents");
  STD_TORCH_CHECK(tensor.numel() == count,
                  name,
                  " must have ",
                  count,
                  " elements, got ",
                  static_cast<int64_t>(tensor.numel()));
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the device of the op's first tensor");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows of `dim` elements that are contiguous by themselves: they may be parts of longer rows.
inline void check_rows(const Tensor& tensor, const char* name, int64_t dim, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == dim && (tensor.stride(1) == 1 || dim <= 1),
                  name,
                  " must be a matrix of contiguous rows of ",
                  dim,
                  " elements");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the device of the op's first tensor");
}

// Memory of such rows, in the dtype of `like`; `num_rows` of them, or any number if it is negative.
inline void* rows(const Tensor& tensor, const char* name, int64_t num_rows, int64_t dim, const Tensor& like) {
  check_rows(tensor, name, dim, like);
  STD_TORCH_CHECK(
      tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of the op's first tensor");
  STD_TORCH_CHECK(num_rows < 0 || tensor.size(0) == num_rows,
                  name,
                  " must have ",
                  num_rows,
                  " rows, got ",
                  static_cast<int64_t>(tensor.size(0)));
  return tensor.mutable_data_ptr();
}

// Memory of a contiguous matrix in the dtype of `like`.
inline void* whole(
    const Tensor& tensor, const char* name, int64_t num_rows, int64_t dim, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return rows(tensor, name, num_rows, dim, like);
}

// Memory of `num_rows` rows of floats.
inline float* float_rows(
    const Tensor& tensor, const char* name, int64_t num_rows, int64_t dim, const Tensor& like) {
  check_rows(tensor, name, dim, like);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.size(0) == num_rows,
                  name,
                  " must be float32 with ",
                  num_rows,
                  " rows");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// Elements from one row to the next.
inline int64_t row_stride(const Tensor& tensor) { return tensor.stride(0); }

inline ElementType element_type(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::BFloat16,
                  "rows must be float32 or bfloat16");
  return tensor.scalar_type() == ScalarType::Float ? ElementType::kFloat32 : ElementType::kBFloat16;
}

// Runs `range(begin, end)` over [0, num_rows) on torch's threads; small work stays on one.
template <typename Body>
void in_parallel(int64_t num_rows, int64_t row_elements, const Body& body) {
  constexpr int64_t kElementsPerTask = 32768;
  if (num_rows == 0) return;
  torch::stable::parallel_for(0, num_rows, kElementsPerTask / (row_elements + 1) + 1, body);
}

// The same for ops that go in phases over chunks.
inline void chunks_in_parallel(int64_t num_chunks, const Range& range) {
  constexpr int64_t kChunksPerTask = 8;
  if (num_chunks > 0) torch::stable::parallel_for(0, num_chunks, kChunksPerTask, range);
}

#ifdef EP_WITH_CUDA
// Calls `launch(stream)` on the tensor's device and its current stream; raises what CUDA reports.
template <typename Launch>
void on_stream(const Tensor& tensor, const char* op, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  op,
                  ": torch has no current CUDA stream");
  const cudaError_t status = launch(static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}
#endif

}  // namespace ep

// The end of a binding: on a GPU `launcher(args, stream)`, else what follows.
#ifdef EP_WITH_CUDA
#define EP_RETURN_IF_CUDA(tensor, launcher, args)                                                       \
  if ((tensor).is_cuda()) {                                                                             \
    return on_stream(tensor, #launcher, [&](cudaStream_t stream) { return launcher((args), stream); }); \
  }
#define EP_REGISTER_CUDA(...) STABLE_TORCH_LIBRARY_IMPL(ep_engine, CUDA, m) __VA_ARGS__
#else
#define EP_RETURN_IF_CUDA(tensor, launcher, args)
#define EP_REGISTER_CUDA(...)
#endif

// Registers one function for every device the ops are built for.
#define EP_REGISTER(...) \
  STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) __VA_ARGS__ EP_REGISTER_CUDA(__VA_ARGS__)
