// The loops of y = cat([f(x), f(-x)], dim), forward and backward, for any f that saves a mask.
//
// In memory a dense x is a matrix, and y has two rows for each of its rows, side by side; so has
// the mask, whose rows begin with a byte. Nothing here knows an activation. As in elementwise.cuh,
// what a thread does is a __host__ __device__ function.
#pragma once

#include "access.cuh"

namespace fused_act::mirrored {

struct Matrix {
  int64_t rows, columns;

  __host__ __device__ int64_t bytes_of_mask_row() const { return (columns + 7) / 8; }
};

// What a thread takes of x: 16 bytes, fewer at the end of a row. A warp's runs lie side by side, so
// that accesses coalesce. A row has as many as its mask has room for: the threads of a mask byte
// are neighbours in a warp.
template <typename T>
constexpr int kRun = 16 / sizeof(T);

template <typename T>
__host__ __device__ __forceinline__ int64_t runs_of_row(Matrix matrix) {
  return matrix.bytes_of_mask_row() * (8 / kRun<T>);
}

template <typename T>
int64_t block_count(Matrix matrix) {
  return (matrix.rows * runs_of_row<T>(matrix) + kThreads - 1) / kThreads;
}

// Where a run begins in x, in the first of its two rows of y, and in that of the mask.
struct Run {
  int64_t x, y, mask;
  int bit;     // of the mask byte, with which it begins
  int length;  // 0 beyond the end of a row, and beyond the last row
};

template <typename T>
__host__ __device__ __forceinline__ Run find_run(Matrix matrix, int64_t block, int thread) {
  const int64_t index = block * kThreads + thread, row_length = runs_of_row<T>(matrix);
  // By a division of 32 bits, if those do: one of 64 would take longer than all the rest.
  const int64_t row = (index | row_length) >> 32 == 0
                          ? static_cast<uint32_t>(index) / static_cast<uint32_t>(row_length)
                          : index / row_length;
  const int64_t column = kRun<T> * (index - row * row_length), left = matrix.columns - column;
  const int64_t length = left < kRun<T> ? left : kRun<T>;
  return {row * matrix.columns + column, 2 * row * matrix.columns + column,
          2 * row * matrix.bytes_of_mask_row() + column / 8, static_cast<int>(column % 8),
          row < matrix.rows && length > 0 ? static_cast<int>(length) : 0};
}

// Store a whole run. Of plain 16-byte stores to several rows nvcc 13.0 makes 4-byte ones.
template <int kWidth, typename T>
__host__ __device__ __forceinline__ void store_run_whole(T* target,
                                                         const float (&values)[kRun<T>]) {
#if defined(__CUDA_ARCH__)
  if constexpr (kWidth == kRun<T>) {
    uint4 words;
    store<kWidth>(reinterpret_cast<T*>(&words), values);
    return __stwb(reinterpret_cast<uint4*>(target), words);
  }
#endif
  store<kWidth>(target, values);
}

// f of a whole run, and the bits that tell of it.
template <int kWidth, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ unsigned activate_run(Activation activation,
                                                          const float (&values)[kRun<T>], T* y) {
  unsigned bits = 0;
  float results[kRun<T>];
#pragma unroll
  for (int i = 0; i < kRun<T>; i++) {
    if constexpr (kMasked) {
      bits = or_if(activation.passes(values[i]), bits, 1u << i);
    }
    results[i] = activation.forward(values[i]);
  }
  store_run_whole<kWidth>(y, results);
  return bits;
}

// The same of fewer elements, one after the other, so that this rare path costs the others no
// registers.
template <bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ unsigned activate_part(Activation activation, const T* x,
                                                           float sign, int length, T* y) {
  unsigned bits = 0;
#pragma unroll 1
  for (int i = 0; i < length; i++) {
    const float value = sign * to_float(x[i]);
    if constexpr (kMasked) {
      bits |= activation.passes(value) ? 1u << i : 0u;
    }
    y[i] = static_cast<T>(activation.forward(value));
  }
  return bits;
}

// What thread `thread` of block `block` does.
template <int kWidth, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void forward_thread(Activation activation, const T* x, T* y,
                                                        uint8_t* mask, Matrix matrix, int64_t block,
                                                        int thread) {
  const Run run = find_run<T>(matrix, block, thread);
  x += run.x;
  y += run.y;
  unsigned bits, mirrored_bits;
  if (run.length == kRun<T>) {
    float values[kRun<T>], negated[kRun<T>];
    load<kWidth>(x, values);
#pragma unroll
    for (int i = 0; i < kRun<T>; i++) {
      negated[i] = -values[i];
    }
    bits = activate_run<kWidth, kMasked>(activation, values, y);
    mirrored_bits = activate_run<kWidth, kMasked>(activation, negated, y + matrix.columns);
  } else {
    bits = activate_part<kMasked>(activation, x, 1.0f, run.length, y);
    mirrored_bits = activate_part<kMasked>(activation, x, -1.0f, run.length, y + matrix.columns);
  }
  if constexpr (kMasked) {
    mask += run.mask;
    store_bits<kRun<T>>(bits, mask, run.bit, run.length > 0);
    store_bits<kRun<T>>(mirrored_bits, mask + matrix.bytes_of_mask_row(), run.bit, run.length > 0);
  }
}

template <int kWidth, typename Activation, typename T>
__host__ __device__ __forceinline__ void backward_thread(Activation activation,
                                                         const T* grad_output, const uint8_t* mask,
                                                         T* grad_input, Matrix matrix,
                                                         int64_t block, int thread) {
  const Run run = find_run<T>(matrix, block, thread);
  grad_output += run.y;
  mask += run.mask;
  grad_input += run.x;
  const T* mirrored_grad = grad_output + matrix.columns;
  const uint8_t* mirrored_mask = mask + matrix.bytes_of_mask_row();
  if (run.length == kRun<T>) {
    float grads[kRun<T>], mirrored_grads[kRun<T>];
    load<kWidth>(grad_output, grads);
    load<kWidth>(mirrored_grad, mirrored_grads);
    const unsigned bits = load_bits<kRun<T>>(mask, run.bit);
    const unsigned mirrored_bits = load_bits<kRun<T>>(mirrored_mask, run.bit);
    float results[kRun<T>];
#pragma unroll
    for (int i = 0; i < kRun<T>; i++) {
      results[i] = activation.gradient(grads[i], bits >> i & 1) -
                   activation.gradient(mirrored_grads[i], mirrored_bits >> i & 1);
    }
    store_run_whole<kWidth>(grad_input, results);
  } else {
#pragma unroll 1
    for (int i = 0; i < run.length; i++) {
      const int bit = run.bit + i;
      grad_input[i] = static_cast<T>(
          activation.gradient(to_float(grad_output[i]), *mask >> bit & 1) -
          activation.gradient(to_float(mirrored_grad[i]), *mirrored_mask >> bit & 1));
    }
  }
}

#if defined(__CUDACC__)
template <int kWidth, bool kMasked, typename Activation, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Activation activation, const T* x, T* y, uint8_t* mask, Matrix matrix) {
  forward_thread<kWidth, kMasked>(activation, x, y, mask, matrix, blockIdx.x, threadIdx.x);
}

template <int kWidth, typename Activation, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Activation activation, const T* grad_output, const uint8_t* mask, T* grad_input,
                    Matrix matrix) {
  backward_thread<kWidth>(activation, grad_output, mask, grad_input, matrix, blockIdx.x,
                          threadIdx.x);
}

template <bool kMasked, typename Activation, typename T>
void launch_forward(Activation activation, const T* x, T* y, uint8_t* mask, Matrix matrix,
                    cudaStream_t stream) {
  with_widest_access_to_rows<T>(
      [&](auto width) {
        forward_kernel<decltype(width)::value, kMasked>
            <<<block_count<T>(matrix), kThreads, 0, stream>>>(activation, x, y, mask, matrix);
      },
      matrix.columns, x, y);
}

template <typename Activation, typename T>
void launch_backward(Activation activation, const T* grad_output, const uint8_t* mask,
                     T* grad_input, Matrix matrix, cudaStream_t stream) {
  with_widest_access_to_rows<T>(
      [&](auto width) {
        backward_kernel<decltype(width)::value><<<block_count<T>(matrix), kThreads, 0, stream>>>(
            activation, grad_output, mask, grad_input, matrix);
      },
      matrix.columns, grad_output, grad_input);
}
#endif

}  // namespace fused_act::mirrored
