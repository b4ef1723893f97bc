// The loops of activations with a learnable weight: one tile of a matrix per thread block. Backward
// also sums what the elements of its tile add to the gradients of the weights.
//
// As in elementwise.cuh, tests run what a thread does on the host; only the sum over the threads of
// a block is the device's own. Nothing here knows an activation: its struct holds the weight.
#pragma once

#include "weighted_tiles.cuh"

namespace fused_act::weighted {

// Load one run as it is stored, which takes fewer registers than in fp32; what is not inside the
// matrix as 0.
template <bool kFull, int kWidth, typename T>
__host__ __device__ __forceinline__ Vector<T, kWidth> load_run(const T* source, int64_t left) {
  if (kFull || left >= kWidth) {
    return *reinterpret_cast<const Vector<T, kWidth>*>(source);
  }
  Vector<T, kWidth> result;
#pragma unroll
  for (int i = 0; i < kWidth; i++) {
    result.elements[i] = i < left ? source[i] : static_cast<T>(0.0f);
  }
  return result;
}

template <bool kFull, int kWidth, typename T>
__host__ __device__ __forceinline__ void store_run(T* target, int64_t left,
                                                   const float (&values)[kWidth]) {
  if constexpr (kFull) {
    store<kWidth>(target, values);
  } else if (left >= kWidth) {
    store<kWidth>(target, values);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      if (i < left) {
        target[i] = static_cast<T>(values[i]);
      }
    }
  }
}

// What a thread has one of for each of its columns, or for each of its rows: weights, and sums.
template <bool kByColumn, typename T, int kWidth>
struct PerWeight {
  static constexpr int kCount = kByColumn ? kWidth : Tile<T, kWidth>::kRuns;
  float values[kCount] = {};

  __host__ __device__ float& at(int run, int i) { return values[kByColumn ? i : run]; }
};

template <bool kByColumn, typename T, int kWidth>
__host__ __device__ __forceinline__ PerWeight<kByColumn, T, kWidth> load_weights(
    const float* weight, const Matrix& matrix, const Place<T, kWidth>& place) {
  PerWeight<kByColumn, T, kWidth> result;
#pragma unroll
  for (int i = 0; i < result.kCount; i++) {
    if constexpr (kByColumn) {
      result.values[i] = place.column + i < matrix.columns ? weight[place.column + i] : 0.0f;
    } else {
      const int64_t row = place.row + i * place.row_step;
      result.values[i] = weight[matrix.weights == 1 ? 0 : row % matrix.weights];
    }
  }
  return result;
}

template <bool kFull, bool kByColumn, template <typename> class Activation, int kWidth, typename T>
__host__ __device__ __forceinline__ void forward_tile(const T* x, const float* weight, T* y,
                                                      const Matrix& matrix,
                                                      const Place<T, kWidth>& place) {
  constexpr int kRuns = Tile<T, kWidth>::kRuns;
  Vector<T, kWidth> loaded[kRuns];
#pragma unroll
  for (int run = 0; run < kRuns; run++) {
    loaded[run] = load_run<kFull, kWidth>(x + place.offset(matrix, run), place.left(matrix, run));
  }
  auto weights = load_weights<kByColumn, T, kWidth>(weight, matrix, place);
#pragma unroll
  for (int run = 0; run < kRuns; run++) {
    float values[kWidth], results[kWidth];
    to_floats(loaded[run], values);
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      results[i] = Activation<T>{weights.at(run, i)}.forward(values[i]);
    }
    store_run<kFull>(y + place.offset(matrix, run), place.left(matrix, run), results);
  }
}

template <bool kFull, bool kByColumn, template <typename> class Activation, int kWidth, typename T>
__host__ __device__ __forceinline__ PerWeight<kByColumn, T, kWidth> backward_tile(
    const T* grad_output, const T* x, const float* weight, T* grad_input, const Matrix& matrix,
    const Place<T, kWidth>& place) {
  constexpr int kRuns = Tile<T, kWidth>::kRuns;
  Vector<T, kWidth> loaded_grads[kRuns], loaded[kRuns];
#pragma unroll
  for (int run = 0; run < kRuns; run++) {
    const int64_t offset = place.offset(matrix, run), left = place.left(matrix, run);
    loaded_grads[run] = load_run<kFull, kWidth>(grad_output + offset, left);
    loaded[run] = load_run<kFull, kWidth>(x + offset, left);
  }
  auto weights = load_weights<kByColumn, T, kWidth>(weight, matrix, place);
  PerWeight<kByColumn, T, kWidth> sums;
#pragma unroll
  for (int run = 0; run < kRuns; run++) {
    float grads[kWidth], values[kWidth], results[kWidth];
    to_floats(loaded_grads[run], grads);
    to_floats(loaded[run], values);
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      const Activation<T> activation{weights.at(run, i)};
      results[i] = grads[i] * activation.derivative(values[i]);
      sums.at(run, i) += activation.weight_gradient(grads[i], values[i]);
    }
    store_run<kFull>(grad_input + place.offset(matrix, run), place.left(matrix, run), results);
  }
  return sums;
}

// What thread `thread` of block `block` does.
template <bool kByColumn, template <typename> class Activation, int kWidth, typename T>
__host__ __device__ __forceinline__ void forward_thread(const T* x, const float* weight, T* y,
                                                        const Matrix& matrix, int block,
                                                        int thread) {
  const Place<T, kWidth> place(matrix, block, thread);
  if (place.full) {
    forward_tile<true, kByColumn, Activation>(x, weight, y, matrix, place);
  } else {
    forward_tile<false, kByColumn, Activation>(x, weight, y, matrix, place);
  }
}

template <bool kByColumn, template <typename> class Activation, int kWidth, typename T>
__host__ __device__ __forceinline__ PerWeight<kByColumn, T, kWidth> backward_thread(
    const T* grad_output, const T* x, const float* weight, T* grad_input, const Matrix& matrix,
    const Place<T, kWidth>& place) {
  if (place.full) {
    return backward_tile<true, kByColumn, Activation>(grad_output, x, weight, grad_input, matrix,
                                                      place);
  }
  return backward_tile<false, kByColumn, Activation>(grad_output, x, weight, grad_input, matrix,
                                                     place);
}

// Where sum `i` of a thread belongs, with those of the other threads of its row or column: the sums
// are [row blocks, columns], or [rows, column blocks]. Negative for one of nothing.
template <bool kByColumn, int kWidth, typename T>
__host__ __device__ __forceinline__ int64_t sum_index(const Matrix& matrix,
                                                      const Place<T, kWidth>& place, int i) {
  if (kByColumn) {
    const int64_t column = place.column + i;
    return column < matrix.columns ? place.row_block * matrix.columns + column : -1;
  }
  const int64_t row = place.row + i * place.row_step;
  return row * matrix.columns < matrix.numel ? row * matrix.column_blocks + place.column_block : -1;
}

// Call `run` with the widest access, of 16 bytes at most, that the addresses and the rows allow,
// with whether columns have the weights, and with the matrix. `inner` is the stride of the
// channels.
template <typename T, typename Run, typename... Pointers>
void with_variant(int64_t numel, int64_t weights, int64_t inner, Run run, Pointers... pointers) {
  auto with_width = [&](auto width) {
    using Chosen = Tile<T, decltype(width)::value>;
    if (weights > 1 && inner == 1) {
      run(width, std::true_type{}, Chosen::template matrix<true>(numel, weights, inner));
    } else {
      run(width, std::false_type{}, Chosen::template matrix<false>(numel, weights, inner));
    }
  };
  // Rows of one weight are of our choosing.
  const int64_t columns = weights == 1 ? 0 : inner == 1 ? weights : inner;
  with_widest_access_to_rows<T>(with_width, columns, pointers...);
}

#if defined(__CUDACC__)
// Sum over the threads of a row, which are neighbours, or of a column, in an order that is always
// the same. Those that stand first then have the sums.
template <bool kByColumn, int kCount>
__device__ __forceinline__ void sum_over_threads(float (&values)[kCount], int across) {
  __shared__ float shared[kCount][kThreads];
  const int first = kByColumn ? across : 1;
  const int end = kByColumn || across > kWarp ? kWarp : across;
  for (int distance = first; distance < end; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      values[i] += __shfl_xor_sync(0xffffffff, values[i], distance);
    }
  }
  if (!kByColumn && across <= kWarp) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    shared[i][threadIdx.x] = values[i];
  }
  __syncthreads();
  const bool stands_first = kByColumn ? threadIdx.x < across : threadIdx.x % across == 0;
  const int threads = kByColumn ? kThreads : across;
  if (stands_first) {
#pragma unroll 1
    for (int other = kWarp; other < threads; other += kWarp) {
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        values[i] += shared[i][threadIdx.x + other];
      }
    }
  }
}

template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
__global__ void __launch_bounds__(kThreads, (Tile<T, kWidth>::kBlocks))
    forward_kernel(const T* x, const float* weight, T* y, Matrix matrix) {
  forward_thread<kByColumn, Activation, kWidth>(x, weight, y, matrix, blockIdx.x, threadIdx.x);
}

template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
__global__ void __launch_bounds__(kThreads, (Tile<T, kWidth>::kBlocks))
    backward_kernel(const T* grad_output, const T* x, const float* weight, T* grad_input,
                    float* sums, Matrix matrix) {
  const Place<T, kWidth> place(matrix, blockIdx.x, threadIdx.x);
  auto found =
      backward_thread<kByColumn, Activation>(grad_output, x, weight, grad_input, matrix, place);
  sum_over_threads<kByColumn>(found.values, matrix.across());
  if (kByColumn ? threadIdx.x < matrix.across() : threadIdx.x % matrix.across() == 0) {
#pragma unroll
    for (int i = 0; i < found.kCount; i++) {
      const int64_t index = sum_index<kByColumn>(matrix, place, i);
      if (index >= 0) {
        sums[index] = found.values[i];
      }
    }
  }
}

template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
void launch_forward(const T* x, const float* weight, T* y, const Matrix& matrix,
                    cudaStream_t stream) {
  forward_kernel<kWidth, kByColumn, Activation>
      <<<Tile<T, kWidth>::blocks(matrix), kThreads, 0, stream>>>(x, weight, y, matrix);
}

template <int kWidth, bool kByColumn, template <typename> class Activation, typename T>
void launch_backward(const T* grad_output, const T* x, const float* weight, T* grad_input,
                     float* sums, const Matrix& matrix, cudaStream_t stream) {
  backward_kernel<kWidth, kByColumn, Activation>
      <<<Tile<T, kWidth>::blocks(matrix), kThreads, 0, stream>>>(grad_output, x, weight, grad_input,
                                                                 sums, matrix);
}
#endif

}  // namespace fused_act::weighted
