// The kernels' loops run on the host, block by block and thread by thread. The sum over the threads
// of a block is the device's own; here it is a plain one.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../../csrc/weighted.cuh"

namespace fused_act::weighted {

// The threads of a block that have something to do: of a tensor with few elements only the first.
template <int kWidth>
int busy_threads(const Matrix& matrix) {
  const int64_t rows = matrix.rows();
  const int64_t busy = rows == 1 ? (matrix.numel + kWidth - 1) / kWidth : rows << matrix.log_across;
  return static_cast<int>(std::min<int64_t>(kThreads, busy));
}

template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
void run_forward_blocks(const T* x, const float* weight, T* y, const Matrix& matrix,
                        int threads = kThreads) {
  for (int block = 0; block < Tile<T, kWidth>::blocks(matrix); block++) {
    for (int thread = 0; thread < threads; thread++) {
      forward_thread<kByColumn, Activation, kWidth>(x, weight, y, matrix, block, thread);
    }
  }
}

// Adds to the sums, of which there are `room`.
template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
void run_backward_blocks(const T* grad_output, const T* x, const float* weight, T* grad_input,
                         float* sums, int64_t room, const Matrix& matrix, int threads = kThreads) {
  for (int block = 0; block < Tile<T, kWidth>::blocks(matrix); block++) {
    for (int thread = 0; thread < threads; thread++) {
      const Place<T, kWidth> place(matrix, block, thread);
      const auto found =
          backward_thread<kByColumn, Activation>(grad_output, x, weight, grad_input, matrix, place);
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
}

}  // namespace fused_act::weighted
