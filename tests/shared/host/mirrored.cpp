// Runs the CUDA loops of a mirrored activation on the host, as elementwise.cpp does the others.
#include "../../../csrc/activations.cuh"
#include "host.h"
#include "mirrored_loops.h"

using namespace fused_act;
using namespace fused_act::mirrored;

extern "C" {

int64_t count_blocks(int dtype, int64_t rows, int64_t columns) {
  const Matrix matrix{rows, columns};
  return dtype == 2 ? block_count<float>(matrix) : block_count<Half>(matrix);
}

int widest_access(int dtype, int64_t columns, const void* a, const void* b) {
  int width = 0;
  with_dtype(dtype, [&](auto element) {
    with_widest_access_to_rows<decltype(element)>(
        [&](auto found) { width = decltype(found)::value; }, columns, a, b);
  });
  return width;
}

// place: offsets in x, y and mask, the first bit, and the length.
void locate(int64_t rows, int64_t columns, int64_t block, int thread, int64_t* place) {
  const auto run = find_run<float>(Matrix{rows, columns}, block, thread);
  place[0] = run.x;
  place[1] = run.y;
  place[2] = run.mask;
  place[3] = run.bit;
  place[4] = run.length;
}

// Without a mask if that is null.
void run_forward(int dtype, const void* x, void* y, uint8_t* mask, int64_t rows, int64_t columns,
                 int64_t first, int64_t last) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto* source = static_cast<const T*>(x);
    auto* target = static_cast<T*>(y);
    if (mask == nullptr) {
      run_forward_blocks<false>(ACTIVATION<T>{}, source, target, mask, Matrix{rows, columns}, first,
                                last);
    } else {
      run_forward_blocks<true>(ACTIVATION<T>{}, source, target, mask, Matrix{rows, columns}, first,
                               last);
    }
  });
}

void run_backward(int dtype, const void* grad_output, const uint8_t* mask, void* grad_input,
                  int64_t rows, int64_t columns, int64_t first, int64_t last) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    run_backward_blocks(ACTIVATION<T>{}, static_cast<const T*>(grad_output), mask,
                        static_cast<T*>(grad_input), Matrix{rows, columns}, first, last);
  });
}

}  // extern "C"
