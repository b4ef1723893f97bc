// The loops of elementwise activations: one tile of a tensor per thread block, in memory order,
// forward and backward.
//
// What a thread does is a __host__ __device__ function of its block and thread index, so that tests
// run the index arithmetic on the host. Nothing here knows an activation.
#pragma once

#include "access.cuh"

namespace fused_act::elementwise {

// Threads per SM that backward is compiled for, so that it takes up to 40 registers each. On an
// H200 it is 0.6 % faster than with the 32 that nvcc takes of itself; why is not known.
constexpr int kBackwardThreads = 1536;

// What a block handles, in bytes of x: small, so that blocks begin and end all the time, and some
// load while others store.
constexpr int kTileBytes = 4096;

template <typename T>
constexpr int kTile = kTileBytes / sizeof(T);

// How the threads of a block share a tile in a kernel for accesses of kWidth elements: one access
// each, or where addresses are misaligned several narrow ones, as many as make 16 bytes. The
// threads' accesses lie side by side, so that those of a warp coalesce.
template <typename T, int kWidth>
struct Shares {
  static constexpr int kThreads = kWidth * sizeof(T) > 16 ? 128 : fused_act::kThreads;
  static constexpr int kElements = kAccess<T, kWidth>;  // of one access
  static constexpr int kCount = kTile<T> / (kThreads * kElements);

  // Where in the tile an access of a thread begins.
  __host__ __device__ static constexpr int offset(int thread, int access) {
    return (access * kThreads + thread) * kElements;
  }
};

// What an activation saves for backward: a mask, or its output, always or in place only.
template <typename Activation>
constexpr bool kSavesMask = requires(Activation activation) { activation.passes(0.0f); };

template <typename Activation>
constexpr bool kSavesInput = requires(Activation activation) { activation.derivative(0.0f); };

template <typename Activation>
constexpr bool kSavesOutput =
    requires(Activation activation) { activation.derivative_from_output(0.0f); };

// An activation whose derivative is that of y.
template <typename Activation>
struct FromOutput {
  Activation activation;

  __host__ __device__ float derivative(float y) const {
    return activation.derivative_from_output(y);
  }
};

template <typename T>
__host__ __device__ __forceinline__ int64_t tile_start(int64_t block) {
  return block * kTile<T>;  // 64 bits: there may be more than 2^31 elements
}

// What one thread does in a full tile.
template <int kWidth, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void forward_tile(Activation activation, const T* x, T* y,
                                                      uint8_t* mask, int thread) {
  using S = Shares<T, kWidth>;
  // All loads come before all stores: x and y may be the same memory, so the compiler cannot do it.
  float values[S::kCount][S::kElements];
#pragma unroll
  for (int access = 0; access < S::kCount; access++) {
    load<S::kElements>(x + S::offset(thread, access), values[access]);
  }
#pragma unroll
  for (int access = 0; access < S::kCount; access++) {
    const int offset = S::offset(thread, access);
    unsigned bits = 0;
    float results[S::kElements];
#pragma unroll
    for (int i = 0; i < S::kElements; i++) {
      if constexpr (kMasked) {
        bits = or_if(activation.passes(values[access][i]), bits, 1u << i);
      }
      results[i] = activation.forward(values[access][i]);
    }
    if constexpr (kMasked) {
      store_bits<S::kElements>(bits, mask, offset);
    }
    store<S::kElements>(y + offset, results);
  }
}

template <int kWidth, bool kMasked, typename Activation, typename T, typename Saved>
__host__ __device__ __forceinline__ void backward_tile(Activation activation, const T* grad_output,
                                                       const Saved* saved, T* grad_input,
                                                       int thread) {
  using S = Shares<T, kWidth>;
  float grads[S::kCount][S::kElements];
  float values[S::kCount][S::kElements];
  unsigned bits[S::kCount];
#pragma unroll
  for (int access = 0; access < S::kCount; access++) {
    const int offset = S::offset(thread, access);
    load<S::kElements>(grad_output + offset, grads[access]);
    if constexpr (kMasked) {
      bits[access] = load_bits<S::kElements>(saved, offset);
    } else {
      load<S::kElements>(saved + offset, values[access]);
    }
  }
#pragma unroll
  for (int access = 0; access < S::kCount; access++) {
    float results[S::kElements];
#pragma unroll
    for (int i = 0; i < S::kElements; i++) {
      if constexpr (kMasked) {
        results[i] = activation.gradient(grads[access][i], bits[access] >> i & 1);
      } else {
        results[i] = grads[access][i] * activation.derivative(values[access][i]);
      }
    }
    store<S::kElements>(grad_input + S::offset(thread, access), results);
  }
}

// What one thread does in the last tile, of `left` elements: eight at a time, one after the other,
// so that this rare path does not cost registers in all the others.
template <int kStride, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void forward_tail(Activation activation, const T* x, T* y,
                                                      uint8_t* mask, int left, int thread) {
#pragma unroll 1
  for (int offset = 8 * thread; offset < left; offset += 8 * kStride) {
    unsigned bits = 0;
#pragma unroll 1
    for (int i = 0; i < 8 && offset + i < left; i++) {
      const float value = to_float(x[offset + i]);
      if constexpr (kMasked) {
        bits |= activation.passes(value) ? 1u << i : 0u;
      }
      y[offset + i] = static_cast<T>(activation.forward(value));
    }
    if (kMasked) {
      mask[offset / 8] = static_cast<uint8_t>(bits);
    }
  }
}

template <int kStride, bool kMasked, typename Activation, typename T, typename Saved>
__host__ __device__ __forceinline__ void backward_tail(Activation activation, const T* grad_output,
                                                       const Saved* saved, T* grad_input, int left,
                                                       int thread) {
#pragma unroll 1
  for (int i = thread; i < left; i += kStride) {
    const float grad = to_float(grad_output[i]);
    if constexpr (kMasked) {
      grad_input[i] = static_cast<T>(activation.gradient(grad, saved[i / 8] >> i % 8 & 1));
    } else {
      grad_input[i] = static_cast<T>(grad * activation.derivative(to_float(saved[i])));
    }
  }
}

// What thread `thread` of block `block` does.
template <int kWidth, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void forward_thread(Activation activation, const T* x, T* y,
                                                        uint8_t* mask, int64_t numel, int64_t block,
                                                        int thread) {
  const int64_t start = tile_start<T>(block);
  const int64_t left = numel - start;
  if (kMasked) {
    mask += start / 8;
  }
  if (left >= kTile<T>) {
    forward_tile<kWidth, kMasked>(activation, x + start, y + start, mask, thread);
  } else {
    forward_tail<Shares<T, kWidth>::kThreads, kMasked>(activation, x + start, y + start, mask,
                                                       static_cast<int>(left), thread);
  }
}

template <int kWidth, bool kMasked, typename Activation, typename T, typename Saved>
__host__ __device__ __forceinline__ void backward_thread(Activation activation,
                                                         const T* grad_output, const Saved* saved,
                                                         T* grad_input, int64_t numel,
                                                         int64_t block, int thread) {
  const int64_t start = tile_start<T>(block);
  const int64_t left = numel - start;
  saved += kMasked ? start / 8 : start;
  grad_output += start;
  grad_input += start;
  if (left >= kTile<T>) {
    backward_tile<kWidth, kMasked>(activation, grad_output, saved, grad_input, thread);
  } else {
    backward_tail<Shares<T, kWidth>::kThreads, kMasked>(activation, grad_output, saved, grad_input,
                                                        static_cast<int>(left), thread);
  }
}

template <typename T>
int64_t block_count(int64_t numel) {
  return (numel + kTile<T> - 1) / kTile<T>;
}

#if defined(__CUDACC__)
template <int kWidth, bool kMasked, typename Activation, typename T>
__global__ void __launch_bounds__(Shares<T, kWidth>::kThreads)
    forward_kernel(Activation activation, const T* x, T* y, uint8_t* mask, int64_t numel) {
  forward_thread<kWidth, kMasked>(activation, x, y, mask, numel, blockIdx.x, threadIdx.x);
}

template <int kWidth, bool kMasked, typename Activation, typename T, typename Saved>
__global__ void __launch_bounds__(Shares<T, kWidth>::kThreads,
                                  kBackwardThreads / Shares<T, kWidth>::kThreads)
    backward_kernel(Activation activation, const T* grad_output, const Saved* saved, T* grad_input,
                    int64_t numel) {
  backward_thread<kWidth, kMasked>(activation, grad_output, saved, grad_input, numel, blockIdx.x,
                                   threadIdx.x);
}

template <bool kMasked, typename Activation, typename T>
void launch_forward(Activation activation, const T* x, T* y, uint8_t* mask, int64_t numel,
                    cudaStream_t stream) {
  with_widest_access<T>(
      [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        forward_kernel<kWidth, kMasked>
            <<<block_count<T>(numel), Shares<T, kWidth>::kThreads, 0, stream>>>(activation, x, y,
                                                                                mask, numel);
      },
      widest_access(), x, y);
}

template <bool kMasked, typename Activation, typename T, typename Saved>
void launch_backward(Activation activation, const T* grad_output, const Saved* saved, T* grad_input,
                     int64_t numel, cudaStream_t stream) {
  auto launch = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    backward_kernel<kWidth, kMasked>
        <<<block_count<T>(numel), Shares<T, kWidth>::kThreads, 0, stream>>>(
            activation, grad_output, saved, grad_input, numel);
  };
  if constexpr (kMasked) {  // the mask is read by the byte
    with_widest_access<T>(launch, widest_access(), grad_output, grad_input);
  } else {
    with_widest_access<T>(launch, widest_access(), grad_output, saved, grad_input);
  }
}
#endif

}  // namespace fused_act::elementwise
