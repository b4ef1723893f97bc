// The kernels' loops run on the host, block by block and thread by thread.
#pragma once

#include <algorithm>

#include "../../../csrc/elementwise.cuh"

namespace fused_act::elementwise {

// The threads of a block that have something to do: of a tensor with few elements only the first.
template <typename T, int kWidth>
int busy_threads(int64_t numel) {
  return static_cast<int>(std::min<int64_t>(Shares<T, kWidth>::kThreads, numel));
}

template <bool kMasked, typename Activation, typename T>
void run_forward_blocks(Activation activation, const T* x, T* y, uint8_t* mask, int64_t numel,
                        int64_t first_block, int64_t last_block) {
  with_widest_access<T>(
      [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const int threads = busy_threads<T, kWidth>(numel);
        for (int64_t block = first_block; block < last_block; block++) {
          for (int thread = 0; thread < threads; thread++) {
            forward_thread<kWidth, kMasked>(activation, x, y, mask, numel, block, thread);
          }
        }
      },
      x, y);
}

template <bool kMasked, typename Activation, typename T, typename Saved>
void run_backward_blocks(Activation activation, const T* grad_output, const Saved* saved,
                         T* grad_input, int64_t numel, int64_t first_block, int64_t last_block) {
  auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int threads = busy_threads<T, kWidth>(numel);
    for (int64_t block = first_block; block < last_block; block++) {
      for (int thread = 0; thread < threads; thread++) {
        backward_thread<kWidth, kMasked>(activation, grad_output, saved, grad_input, numel, block,
                                         thread);
      }
    }
  };
  if constexpr (kMasked) {
    with_widest_access<T>(run, grad_output, grad_input);
  } else {
    with_widest_access<T>(run, grad_output, saved, grad_input);
  }
}

}  // namespace fused_act::elementwise
