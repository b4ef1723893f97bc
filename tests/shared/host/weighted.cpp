// Runs the loops of csrc/weighted.cuh on the host, block by block and thread by thread, for each
// activation with a weight. The sum over the threads of a block is the device's own; here it is a
// plain one. See host_kernels.py.
#include "../../../csrc/weighted.cuh"

#include "../../../csrc/activations.cuh"
#include "host.h"

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
      constexpr int kWidth = decltype(width)::value;
      for (int block = 0; block < Tile<T, kWidth>::blocks(matrix); block++) {
        for (int thread = 0; thread < kThreads; thread++) {
          forward_thread<decltype(by_column)::value, ACTIVATION, kWidth>(source, weight, target,
                                                                         matrix, block, thread);
        }
      }
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
      shape[0] = kByColumn ? Tile<T, kWidth>::row_blocks(matrix) : matrix.rows() / weights;
      shape[1] = weights;
      shape[2] = kByColumn ? 1 : matrix.column_blocks;
      for (int block = 0; block < Tile<T, kWidth>::blocks(matrix); block++) {
        for (int thread = 0; thread < kThreads; thread++) {
          const Place<T, kWidth> place(matrix, block, thread);
          const auto found =
              backward_thread<kByColumn, ACTIVATION>(grad, source, weight, target, matrix, place);
          for (int i = 0; i < found.kCount; i++) {
            const int64_t index = sum_index<kByColumn>(matrix, place, i);
            if (index >= 0 && index < room) {
              sums[index] += found.values[i];
            } else if (found.values[i] != 0.0f) {
              sums[0] = NAN;  // a sum that would be lost, or written outside
            }
          }
        }
      }
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
