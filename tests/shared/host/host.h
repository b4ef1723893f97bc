// What the host runs of the CUDA loops share.
#pragma once

#include "../../../csrc/access.cuh"

namespace fused_act {

// dtype: 0 for fp16, 1 for bf16, 2 for fp32.
template <typename Run>
void with_dtype(int dtype, Run run) {
  if (dtype == 0) {
    run(Half{});
  } else if (dtype == 1) {
    run(BFloat16{});
  } else {
    run(float{});
  }
}

}  // namespace fused_act
