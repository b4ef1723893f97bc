// What the ops of all families do with tensors: checks, allocation, layouts, the launch.
//
// LibTorch's stable ABI only: one library for torch >= 2.10 and every Python.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "access.cuh"

// Only libtorch_cuda has this one. Weak, or the library would not load in a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fused_act {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using torch::stable::detail::StableLibrary;

inline cudaStream_t current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fused_act: this torch has no CUDA; install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Call `run` with a value of the element type of x.
template <typename Run>
void with_element_type(const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "fused_act: expected float16, bfloat16 or float32, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

inline bool equal(torch::headeronly::IntHeaderOnlyArrayRef a,
                  torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Python checks what users pass in and raises the better errors; this keeps memory safe below it.
inline void check_match(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.is_cuda() && other.is_cuda(), "fused_act: expected CUDA tensors");
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type() && equal(x.sizes(), other.sizes()) &&
                      x.get_device_index() == other.get_device_index(),
                  "fused_act: expected tensors of one dtype, shape and device");
}

// Whether a tensor of this shape, which has elements, fills its memory with this stride.
inline bool is_dense(torch::headeronly::IntHeaderOnlyArrayRef shape,
                     torch::headeronly::IntHeaderOnlyArrayRef stride) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (size_t i = 0; i < stride.size(); i++) {
    if (shape[i] != 1) {
      dimensions.emplace_back(stride[i], shape[i]);
    }
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [step, size] : dimensions) {
    if (step != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype,
                            const Tensor& like) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &result));
  return Tensor(result);
}

inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// An empty tensor in the strides of a dense x, else in those that torch chooses. For a dense x it
// does without torch::stable::empty_like, which looks its op up by name at each call: 0.4 us.
inline Tensor allocate_like(const Tensor& x) {
  if (x.is_contiguous() || is_dense(x.sizes(), x.strides())) {
    return empty_strided(x.sizes(), x.strides(), dtype_of(x), x);
  }
  return torch::stable::empty_like(x);
}

// Whether the elements of x lie in memory as `stride` says. The stride of a dimension of size 1 is
// of no account: channels_last 1 x 1 images are contiguous.
inline bool has_layout(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef stride) {
  for (int64_t i = 0; i < x.dim(); i++) {
    if (x.size(i) != 1 && x.stride(i) != stride[i]) {
      return false;
    }
  }
  return true;
}

// x in the strides of `like`: itself or a copy.
inline Tensor with_layout_of(const Tensor& like, const Tensor& x) {
  if (has_layout(x, like.strides())) {
    return x;
  }
  Tensor copy = allocate_like(like);
  torch::stable::copy_(copy, x);
  return copy;
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess,
                  "fused_act: the kernel did not launch: ", cudaGetErrorString(error));
}

}  // namespace fused_act
