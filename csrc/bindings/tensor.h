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

// Memory of a contiguous (rows, dim) matrix of rows.
inline void* rows(const Tensor& tensor, const char* name, int64_t dim, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous() && tensor.size(1) == dim,
                  name,
                  " must be a contiguous matrix with rows of ",
                  dim,
                  " elements");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(),
                  name,
                  " must have the dtype and device of the op's first tensor");
  return tensor.mutable_data_ptr();
}

inline ElementType element_type(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::BFloat16,
                  "rows must be float32 or bfloat16");
  return tensor.scalar_type() == ScalarType::Float ? ElementType::kFloat32 : ElementType::kBFloat16;
}

// Runs `range(begin, end)` over [0, num_rows) on torch's threads; small work stays on one.
template <typename Range>
void in_parallel(int64_t num_rows, int64_t row_elements, const Range& range) {
  constexpr int64_t kElementsPerTask = 32768;
  torch::stable::parallel_for(0, num_rows, kElementsPerTask / (row_elements + 1) + 1, range);
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
