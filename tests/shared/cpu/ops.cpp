// The raw ops of csrc/ built for CPU tensors, so that all that the host does in a call can be
// tested and timed without a GPU: checks, allocation, layouts, boxing. The kernels' own functors
// run in a plain loop. See cpu_ops.py.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {

// A CPU has no device to change to.
struct NoDeviceGuard {
  explicit NoDeviceGuard(DeviceIndex) {}
  ~NoDeviceGuard() {}
};

}  // namespace torch::stable::accelerator

// Below, what asks for CUDA asks for the CPU.
#define is_cuda is_cpu
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define DeviceGuard NoDeviceGuard

#include "../../../csrc/activations.cuh"
#include "../host/elementwise_loops.h"
#include "../host/mirrored_loops.h"
#include "../host/weighted_loops.h"

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

namespace fused_act::elementwise {

template <bool kMasked, typename Activation, typename T>
void launch_forward(Activation activation, const T* x, T* y, uint8_t* mask, int64_t numel,
                    cudaStream_t) {
  run_forward_blocks<kMasked>(activation, x, y, mask, numel, 0, block_count<T>(numel));
}

template <bool kMasked, typename Activation, typename T, typename Saved>
void launch_backward(Activation activation, const T* grad_output, const Saved* saved, T* grad_input,
                     int64_t numel, cudaStream_t) {
  run_backward_blocks<kMasked>(activation, grad_output, saved, grad_input, numel, 0,
                               block_count<T>(numel));
}

}  // namespace fused_act::elementwise

namespace fused_act::mirrored {

template <bool kMasked, typename Activation, typename T>
void launch_forward(Activation activation, const T* x, T* y, uint8_t* mask, Matrix matrix,
                    cudaStream_t) {
  run_forward_blocks<kMasked>(activation, x, y, mask, matrix, 0, block_count<T>(matrix));
}

template <typename Activation, typename T>
void launch_backward(Activation activation, const T* grad_output, const uint8_t* mask,
                     T* grad_input, Matrix matrix, cudaStream_t) {
  run_backward_blocks(activation, grad_output, mask, grad_input, matrix, 0, block_count<T>(matrix));
}

}  // namespace fused_act::mirrored

namespace fused_act::weighted {

template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
void launch_forward(const T* x, const float* weight, T* y, const Matrix& matrix, cudaStream_t) {
  run_forward_blocks<kWidth, kByColumn, Activation>(x, weight, y, matrix,
                                                    busy_threads<kWidth>(matrix));
}

template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
void launch_backward(const T* grad_output, const T* x, const float* weight, T* grad_input,
                     float* sums, const Matrix& matrix, cudaStream_t) {
  const auto shape = shape_of_sums<kByColumn, kWidth, T>(matrix);
  const int64_t count = shape[0] * shape[1] * shape[2];
  std::fill_n(sums, count, 0.0f);
  run_backward_blocks<kWidth, kByColumn, Activation>(grad_output, x, weight, grad_input, sums,
                                                     count, matrix, busy_threads<kWidth>(matrix));
}

}  // namespace fused_act::weighted

#include "../../../csrc/elementwise_ops.cuh"
#include "../../../csrc/mirrored_ops.cuh"
#include "../../../csrc/weighted_ops.cuh"

namespace fused_act {
namespace {

STABLE_TORCH_LIBRARY_IMPL(fused_act_csrc, CPU, library) { REGISTRATIONS }

}  // namespace
}  // namespace fused_act
