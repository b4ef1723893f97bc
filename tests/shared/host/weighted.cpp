// Runs the CUDA loops of an activation with a weight on the host, as elementwise.cpp does the
// others.
#include "../../../csrc/activations.cuh"
#include "host.h"
#include "weighted_loops.h"

using namespace fused_act;
using namespace fused_act::weighted;

extern "C" {

void set_errors(int exp2_ulps, int reciprocal_ulps) {
  exp2_error = exp2_ulps;
  reciprocal_error = reciprocal_ulps;
}

void run_forward(int dtype, const void* x, const float* weight, void* y, int64_t numel,
                 int64_t weights, int64_t inner) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(x);
    T* target = static_cast<T*>(y);
    auto run = [&](auto width, auto by_column, const Matrix& matrix) {
      run_forward_blocks<decltype(width)::value, decltype(by_column)::value, ACTIVATION>(
          source, weight, target, matrix);
    };
    with_variant<T>(numel, weights, inner, run, source, target);
  });
}

// Writes the sums, at most `room`, and returns their shape as [outer, weights, inner].
void run_backward(int dtype, const void* grad_output, const void* x, const float* weight,
                  void* grad_input, float* sums, int64_t room, int64_t numel, int64_t weights,
                  int64_t inner, int64_t* shape) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const T* grad = static_cast<const T*>(grad_output);
    const T* source = static_cast<const T*>(x);
    T* target = static_cast<T*>(grad_input);
    auto run = [&](auto width, auto by_column, const Matrix& matrix) {
      constexpr int kWidth = decltype(width)::value;
      constexpr bool kByColumn = decltype(by_column)::value;
      const auto found = shape_of_sums<kByColumn, kWidth, T>(matrix);
      std::copy(found.begin(), found.end(), shape);
      run_backward_blocks<kWidth, kByColumn, ACTIVATION>(grad, source, weight, target, sums, room,
                                                         matrix);
    };
    with_variant<T>(numel, weights, inner, run, grad, source, target);
  });
}

// The first and the last row and column of a block, for offsets beyond 32 bits.
void place_of(int64_t numel, int64_t weights, int64_t inner, int block, int thread,
              int64_t* offset) {
  auto run = [&](auto width, auto by_column, const Matrix& matrix) {
    *offset = Place<float, decltype(width)::value>(matrix, block, thread).offset(matrix, 0);
  };
  with_variant<float>(numel, weights, inner, run, static_cast<const float*>(nullptr));
}

}  // extern "C"
