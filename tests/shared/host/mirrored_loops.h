// The kernels' loops run on the host, block by block and thread by thread.
#pragma once

#include "../../../csrc/mirrored.cuh"

namespace fused_act::mirrored {

template <bool kMasked, typename Activation, typename T>
void run_forward_blocks(Activation activation, const T* x, T* y, uint8_t* mask, Matrix matrix,
                        int64_t first_block, int64_t last_block) {
  with_widest_access_to_rows<T>(
      [&](auto width) {
        for (int64_t block = first_block; block < last_block; block++) {
          for (int thread = 0; thread < kThreads; thread++) {
            forward_thread<decltype(width)::value, kMasked>(activation, x, y, mask, matrix, block,
                                                            thread);
          }
        }
      },
      matrix.columns, x, y);
}

template <typename Activation, typename T>
void run_backward_blocks(Activation activation, const T* grad_output, const uint8_t* mask,
                         T* grad_input, Matrix matrix, int64_t first_block, int64_t last_block) {
  with_widest_access_to_rows<T>(
      [&](auto width) {
        for (int64_t block = first_block; block < last_block; block++) {
          for (int thread = 0; thread < kThreads; thread++) {
            backward_thread<decltype(width)::value>(activation, grad_output, mask, grad_input,
                                                    matrix, block, thread);
          }
        }
      },
      matrix.columns, grad_output, grad_input);
}

}  // namespace fused_act::mirrored
