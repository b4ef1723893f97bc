// The loops of y = cat([f(x), f(-x)], dim), forward and backward, for any f that saves a mask.
//
// In memory a dense x is a matrix, and y has two rows for each of its rows, side by side; so has
// the mask, whose rows begin with a byte. Nothing here knows an activation. As in elementwise.cuh,
// what a thread does is a __host__ __device__ function.
#pragma once

#include "elementwise.cuh"

namespace fused_act {

struct MirroredMatrix {
  int64_t rows, columns;

  // A run is what a thread takes at a time: the elements of a mask byte, fewer at the end of a row.
  __host__ __device__ int64_t runs_of_row() const { return (columns + 7) / 8; }
};

template <typename T>
constexpr int kRunsPerThread = kElementsPerThread<T> / 8;

template <typename T>
int64_t mirrored_block_count(MirroredMatrix matrix) {
  constexpr int64_t kRuns = kThreads * kRunsPerThread<T>;
  return (matrix.rows * matrix.runs_of_row() + kRuns - 1) / kRuns;
}

// A run: where it begins in x, and in the first of its two rows of y and of the mask.
struct Run {
  int64_t x, y, mask;
  int length;  // 0 beyond the last row
};

// The run that a thread takes `count`-th. A warp's runs lie side by side, so that accesses
// coalesce.
template <typename T>
__host__ __device__ __forceinline__ Run find_run(MirroredMatrix matrix, int64_t block, int thread,
                                                 int count) {
  const int64_t index = (block * kRunsPerThread<T> + count) * kThreads + thread;
  const int64_t runs_of_row = matrix.runs_of_row();
  // By a division of 32 bits, if those do: one of 64 would take longer than all the rest.
  const int64_t row = (index | runs_of_row) >> 32 == 0
                          ? static_cast<uint32_t>(index) / static_cast<uint32_t>(runs_of_row)
                          : index / runs_of_row;
  const int64_t run = index - row * runs_of_row;
  const int64_t left = matrix.columns - 8 * run;
  return {row * matrix.columns + 8 * run, 2 * row * matrix.columns + 8 * run,
          2 * row * runs_of_row + run,
          row < matrix.rows ? static_cast<int>(left < 8 ? left : 8) : 0};
}

template <typename T>
struct RunsOfThread {
  Run runs[kRunsPerThread<T>];
  bool full = true;

  __host__ __device__ __forceinline__ RunsOfThread(MirroredMatrix matrix, int64_t block,
                                                   int thread) {
#pragma unroll
    for (int i = 0; i < kRunsPerThread<T>; i++) {
      runs[i] = find_run<T>(matrix, block, thread, i);
      full = full && runs[i].length == 8;
    }
  }
};

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void store_words(void* target, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(target)), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void store_words(void* target, const uint32_t (&words)[8]) {
  asm volatile("st.global.v8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};"
               :
               : "l"(__cvta_generic_to_global(target)), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3]), "r"(words[4]), "r"(words[5]), "r"(words[6]), "r"(words[7])
               : "memory");
}
#endif

// Store eight elements. Of plain 16-byte stores to several rows nvcc 13.0 makes 4-byte ones.
template <int kWidth, typename T>
__host__ __device__ __forceinline__ void store_whole(T* target, const float (&values)[8]) {
  using Access = Vector<T, kWidth>;
#if defined(__CUDA_ARCH__)
  constexpr bool kByWords = sizeof(Access) >= 16;
#else
  constexpr bool kByWords = false;
#endif
  if constexpr (kByWords) {
#pragma unroll
    for (int i = 0; i < 8; i += kWidth) {
      alignas(Access) uint32_t words[sizeof(Access) / 4];
      store<kWidth>(reinterpret_cast<T*>(words),
                    reinterpret_cast<const float (&)[kWidth]>(values[i]));
      store_words(target + i, words);
    }
  } else {
    store<kWidth>(target, values);
  }
}

// f of eight elements, and the mask byte that tells of them.
template <int kWidth, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void store_activated(Activation activation,
                                                         const float (&values)[8], T* y,
                                                         uint8_t* mask) {
  if constexpr (kMasked) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      bits = or_if(activation.passes(values[i]), bits, 1u << i);
    }
    *mask = static_cast<uint8_t>(bits);
  }
  float results[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    results[i] = activation.forward(values[i]);
  }
  store_whole<kWidth>(y, results);
}

// The same of fewer, one after the other, so that this rare path costs the others no registers.
template <bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void activate_part(Activation activation, const T* x,
                                                       float sign, int length, T* y,
                                                       uint8_t* mask) {
  unsigned bits = 0;
#pragma unroll 1
  for (int i = 0; i < length; i++) {
    const float value = sign * to_float(x[i]);
    if constexpr (kMasked) {
      bits |= activation.passes(value) ? 1u << i : 0u;
    }
    y[i] = static_cast<T>(activation.forward(value));
  }
  if (kMasked && length > 0) {
    *mask = static_cast<uint8_t>(bits);
  }
}

// What thread `thread` of block `block` does.
template <int kWidth, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void mirrored_forward_thread(Activation activation, const T* x,
                                                                 T* y, uint8_t* mask,
                                                                 MirroredMatrix matrix,
                                                                 int64_t block, int thread) {
  const RunsOfThread<T> at(matrix, block, thread);
  const int64_t mask_row = matrix.runs_of_row();
  if (at.full) {
    float values[kRunsPerThread<T>][8];
#pragma unroll
    for (int i = 0; i < kRunsPerThread<T>; i++) {
      load<kWidth>(x + at.runs[i].x, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kRunsPerThread<T>; i++) {
      const Run& run = at.runs[i];
      float negated[8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        negated[j] = -values[i][j];
      }
      T* target = y + run.y;
      store_activated<kWidth, kMasked>(activation, values[i], target, mask + run.mask);
      store_activated<kWidth, kMasked>(activation, negated, target + matrix.columns,
                                       mask + run.mask + mask_row);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRunsPerThread<T>; i++) {
      const Run run = find_run<T>(matrix, block, thread, i);
      T* target = y + run.y;
      activate_part<kMasked>(activation, x + run.x, 1.0f, run.length, target, mask + run.mask);
      activate_part<kMasked>(activation, x + run.x, -1.0f, run.length, target + matrix.columns,
                             mask + run.mask + mask_row);
    }
  }
}

template <int kWidth, typename Activation, typename T>
__host__ __device__ __forceinline__ void mirrored_backward_thread(
    Activation activation, const T* grad_output, const uint8_t* mask, T* grad_input,
    MirroredMatrix matrix, int64_t block, int thread) {
  const RunsOfThread<T> at(matrix, block, thread);
  const int64_t mask_row = matrix.runs_of_row();
  if (at.full) {
    float grads[kRunsPerThread<T>][2][8];
    unsigned bits[kRunsPerThread<T>][2];
#pragma unroll
    for (int i = 0; i < kRunsPerThread<T>; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        load<kWidth>(grad_output + at.runs[i].y + half * matrix.columns, grads[i][half]);
        bits[i][half] = mask[at.runs[i].mask + half * mask_row];
      }
    }
#pragma unroll
    for (int i = 0; i < kRunsPerThread<T>; i++) {
      float results[8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        results[j] = activation.gradient(grads[i][0][j], bits[i][0] >> j & 1) -
                     activation.gradient(grads[i][1][j], bits[i][1] >> j & 1);
      }
      store_whole<kWidth>(grad_input + at.runs[i].x, results);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRunsPerThread<T>; i++) {
      const Run run = find_run<T>(matrix, block, thread, i);
#pragma unroll 1
      for (int j = 0; j < run.length; j++) {
        const T* grad = grad_output + run.y + j;
        const uint8_t* bits = mask + run.mask;
        grad_input[run.x + j] = static_cast<T>(
            activation.gradient(to_float(grad[0]), *bits >> j & 1) -
            activation.gradient(to_float(grad[matrix.columns]), bits[mask_row] >> j & 1));
      }
    }
  }
}

// Call `run` with the widest access that rows of x, one after the other from there, allow.
template <typename T, typename Function>
void with_widest_access_to_rows(Function run, MirroredMatrix matrix, const void* a, const void* b) {
  const auto step = static_cast<uintptr_t>(matrix.columns * sizeof(T));
  with_widest_access<T, 8 * sizeof(T)>(run, a, b, reinterpret_cast<const void*>(step));
}

#if defined(__CUDACC__)
template <int kWidth, bool kMasked, typename Activation, typename T>
__global__ void __launch_bounds__(kThreads)
    mirrored_forward_kernel(Activation activation, const T* x, T* y, uint8_t* mask,
                            MirroredMatrix matrix) {
  mirrored_forward_thread<kAccess<T, kWidth>, kMasked>(activation, x, y, mask, matrix, blockIdx.x,
                                                       threadIdx.x);
}

template <int kWidth, typename Activation, typename T>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    mirrored_backward_kernel(Activation activation, const T* grad_output, const uint8_t* mask,
                             T* grad_input, MirroredMatrix matrix) {
  mirrored_backward_thread<kAccess<T, kWidth>>(activation, grad_output, mask, grad_input, matrix,
                                               blockIdx.x, threadIdx.x);
}

template <bool kMasked, typename Activation, typename T>
void launch_mirrored_forward(Activation activation, const T* x, T* y, uint8_t* mask,
                             MirroredMatrix matrix, cudaStream_t stream) {
  with_widest_access_to_rows<T>(
      [&](auto width) {
        mirrored_forward_kernel<decltype(width)::value, kMasked>
            <<<mirrored_block_count<T>(matrix), kThreads, 0, stream>>>(activation, x, y, mask,
                                                                       matrix);
      },
      matrix, x, y);
}

template <typename Activation, typename T>
void launch_mirrored_backward(Activation activation, const T* grad_output, const uint8_t* mask,
                              T* grad_input, MirroredMatrix matrix, cudaStream_t stream) {
  with_widest_access_to_rows<T>(
      [&](auto width) {
        mirrored_backward_kernel<decltype(width)::value>
            <<<mirrored_block_count<T>(matrix), kThreads, 0, stream>>>(activation, grad_output,
                                                                       mask, grad_input, matrix);
      },
      matrix, grad_output, grad_input);
}
#endif

}  // namespace fused_act
