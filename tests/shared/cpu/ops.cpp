// The raw ops of csrc/ built for CPU tensors, so that all that the host does in a call can be
// tested and timed without a GPU: checks, allocation, layouts, boxing. The kernels' own functors
// run in a plain loop, or not at all. See cpu_ops.py.
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

extern "C" {

// Whether a launch computes, or does nothing.
bool fused_act_computes = true;

void set_computes(bool computes) { fused_act_computes = computes; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

namespace fused_act::elementwise {

template <bool kMasked, typename Activation, typename T>
void launch_forward(Activation activation, const T* x, T* y, uint8_t* mask, int64_t numel,
                    cudaStream_t) {
  if (fused_act_computes) {
    run_forward_blocks<kMasked>(activation, x, y, mask, numel, 0, block_count<T>(numel));
  }
}

template <bool kMasked, typename Activation, typename T, typename Saved>
void launch_backward(Activation activation, const T* grad_output, const Saved* saved, T* grad_input,
                     int64_t numel, cudaStream_t) {
  if (fused_act_computes) {
    run_backward_blocks<kMasked>(activation, grad_output, saved, grad_input, numel, 0,
                                 block_count<T>(numel));
  }
}

}  // namespace fused_act::elementwise

#include "../../../csrc/elementwise_ops.cuh"

namespace fused_act {
namespace {

STABLE_TORCH_LIBRARY_IMPL(fused_act_csrc, CPU, library) { REGISTRATIONS }

}  // namespace
}  // namespace fused_act
