// Runs the CUDA kernels' loops and functors on the host, block by block and thread by thread.
//
// Compiled once per activation, with -DACTIVATION=Swish -DPARAMETER_COUNT=1: see
// host_kernels.py, which reads both out of csrc/register.cu.
#include <type_traits>
#include <utility>

#include "../../../csrc/activations.cuh"
#include "elementwise_loops.h"
#include "host.h"

namespace fused_act::elementwise {
namespace {

template <typename T, size_t... I>
ACTIVATION<T> make(const double* parameters, std::index_sequence<I...>) {
  return ACTIVATION<T>{static_cast<float>(parameters[I])...};
}

template <typename T>
ACTIVATION<T> make(const double* parameters) {
  return make<T>(parameters, std::make_index_sequence<PARAMETER_COUNT>());
}

}  // namespace
}  // namespace fused_act::elementwise

using namespace fused_act;
using namespace fused_act::elementwise;

extern "C" {

void set_errors(int exp2_ulps, int reciprocal_ulps) {
  exp2_error = exp2_ulps;
  reciprocal_error = reciprocal_ulps;
}

float run_exp2(float x) { return exp2_approx(x); }

float run_reciprocal(float x) { return reciprocal_approx(x); }

int64_t count_blocks(int dtype, int64_t numel) {
  return dtype == 2 ? block_count<float>(numel) : block_count<Half>(numel);
}

int64_t tile(int dtype) { return dtype == 2 ? kTile<float> : kTile<Half>; }

int widest_access(int dtype, const void* a, const void* b) {
  int width = 0;
  with_dtype(dtype, [&](auto element) {
    with_widest_access<decltype(element)>([&](auto found) { width = found; }, a, b);
  });
  return width;
}

void run_forward(int dtype, const double* parameters, const void* x, void* y, uint8_t* mask,
                 int64_t numel, int64_t first_block, int64_t last_block) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto activation = make<T>(parameters);
    const auto* source = static_cast<const T*>(x);
    auto* result = static_cast<T*>(y);
    if constexpr (kSavesMask<ACTIVATION<T>>) {
      if (mask != nullptr) {
        run_forward_blocks<true>(activation, source, result, mask, numel, first_block, last_block);
        return;
      }
    }
    run_forward_blocks<false>(activation, source, result, mask, numel, first_block, last_block);
  });
}

// saves: 'x', 'y' or 'm' for a mask.
void run_backward(int dtype, const double* parameters, const void* grad_output, const void* saved,
                  void* grad_input, int64_t numel, int64_t first_block, int64_t last_block,
                  char saves) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto* grad = static_cast<const T*>(grad_output);
    auto* result = static_cast<T*>(grad_input);
    const auto activation = make<T>(parameters);
    if constexpr (kSavesMask<ACTIVATION<T>>) {
      run_backward_blocks<true>(activation, grad, static_cast<const uint8_t*>(saved), result, numel,
                                first_block, last_block);
    }
    if constexpr (kSavesInput<ACTIVATION<T>>) {
      if (saves == 'x') {
        run_backward_blocks<false>(activation, grad, static_cast<const T*>(saved), result, numel,
                                   first_block, last_block);
      }
    }
    if constexpr (kSavesOutput<ACTIVATION<T>>) {
      if (saves == 'y') {
        run_backward_blocks<false>(FromOutput<ACTIVATION<T>>{activation}, grad,
                                   static_cast<const T*>(saved), result, numel, first_block,
                                   last_block);
      }
    }
  });
}

}  // extern "C"
