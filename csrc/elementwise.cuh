// The loops: one tile of a tensor per thread block, in memory order, forward and backward.
//
// What a thread does is a __host__ __device__ function of its block and thread index, so that tests
// run the index arithmetic on the host. Nothing here knows an activation.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "math.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fused_act {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int kThreads = 256;

// Threads per SM that backward is compiled for, so that it takes up to 40 registers each. On an
// H200 it is 0.6 % faster than with the 32 that nvcc takes of itself; why is not known.
constexpr int kBackwardThreads = 1536;

// What a block handles, in bytes of x: small, so that blocks begin and end all the time, and some
// load while others store.
constexpr int kTileBytes = 4096;

template <typename T>
constexpr int kTile = kTileBytes / sizeof(T);

// Bytes that an access of a thread can move.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr int kWidestAccess = 16;
#else
constexpr int kWidestAccess = 32;
#endif

// What one access moves: kWidth elements.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T elements[kWidth];
};

// The width of the accesses that a kernel for kWidth makes: on a GPU without 32-byte accesses, two
// of 16 in their place.
template <typename T, int kWidth>
constexpr int kAccess = kWidth * sizeof(T) > kWidestAccess ? kWidestAccess / sizeof(T) : kWidth;

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(Half x) { return static_cast<float>(x); }
__host__ __device__ __forceinline__ float to_float(BFloat16 x) { return static_cast<float>(x); }

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void round_pair(float a, float b, Half* target) {
  *reinterpret_cast<__half2*>(target) = __floats2half2_rn(a, b);
}

__device__ __forceinline__ void round_pair(float a, float b, BFloat16* target) {
  *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(a, b);
}

// By the word: the upper half taken by itself costs two instructions.
__device__ __forceinline__ void widen_pair(const BFloat16* source, float& a, float& b) {
  const auto pair = *reinterpret_cast<const uint32_t*>(source);
  a = __uint_as_float(pair << 16);
  b = __uint_as_float(pair & 0xffff0000);
}
#endif

template <typename T, int kWidth>
__host__ __device__ __forceinline__ void to_floats(const Vector<T, kWidth>& vector, float* values) {
#if defined(__CUDA_ARCH__)
  constexpr bool kPairs = std::is_same_v<T, BFloat16> && kWidth % 2 == 0;
#else
  constexpr bool kPairs = false;
#endif
  if constexpr (kPairs) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      widen_pair(&vector.elements[i], values[i], values[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      values[i] = to_float(vector.elements[i]);
    }
  }
}

// Round to the element type, to nearest even. The device does two in one instruction.
template <typename T, int kWidth>
__host__ __device__ __forceinline__ Vector<T, kWidth> from_floats(const float (&values)[kWidth]) {
  Vector<T, kWidth> result;
#if defined(__CUDA_ARCH__)
  constexpr bool kPairs = sizeof(T) == 2 && kWidth % 2 == 0;
#else
  constexpr bool kPairs = false;
#endif
  if constexpr (kPairs) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      round_pair(values[i], values[i + 1], &result.elements[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      result.elements[i] = static_cast<T>(values[i]);
    }
  }
  return result;
}

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

// Load one run into fp32.
template <int kWidth, int kRun, typename T>
__host__ __device__ __forceinline__ void load(const T* source, float (&values)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i += kWidth) {
    const auto vector = *reinterpret_cast<const Vector<T, kWidth>*>(source + i);
    to_floats(vector, values + i);
  }
}

template <int kWidth, int kRun, typename T>
__host__ __device__ __forceinline__ void store(T* target, const float (&values)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i += kWidth) {
    float part[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; j++) {
      part[j] = values[i + j];
    }
    *reinterpret_cast<Vector<T, kWidth>*>(target + i) = from_floats<T, kWidth>(part);
  }
}

// Write the mask of the elements from `offset` on, a bit for each. Threads whose accesses are
// narrower than the eight elements of a byte join their bits, which takes all threads of a warp,
// also those that have none, for which `any` is false.
template <int kElements>
__host__ __device__ __forceinline__ void store_bits(unsigned bits, uint8_t* mask, int offset,
                                                    bool any = true) {
  mask += offset / 8;
  if constexpr (kElements < 8) {
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int distance = 1; distance < 8 / kElements; distance *= 2) {
      bits |= __shfl_down_sync(0xffffffff, bits, distance) << distance * kElements;
    }
    if (any && offset % 8 == 0) {
      *mask = static_cast<uint8_t>(bits);
    }
#else
    // The host runs one thread after the other.
    if (any) {
      *mask = static_cast<uint8_t>(offset % 8 == 0 ? bits : *mask | bits << offset % 8);
    }
#endif
  } else if (any) {
#pragma unroll
    for (int i = 0; i < kElements; i += 8) {
      mask[i / 8] = static_cast<uint8_t>(bits >> i);
    }
  }
}

template <int kElements>
__host__ __device__ __forceinline__ unsigned load_bits(const uint8_t* mask, int offset) {
  unsigned bits = mask[offset / 8];
#pragma unroll
  for (int i = 8; i < kElements; i += 8) {
    bits |= static_cast<unsigned>(mask[(offset + i) / 8]) << i;
  }
  return bits >> offset % 8;
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

// Call `run` with the widest access, of kBytes at most, that all the addresses allow. A number of
// bytes among them allows no wider one than that.
template <typename T, int kBytes = 32, typename Run, typename... Pointers>
void with_widest_access(Run run, Pointers... pointers) {
  const uintptr_t addresses = (reinterpret_cast<uintptr_t>(pointers) | ...);
  if constexpr (kBytes > sizeof(T)) {
    if (addresses % kBytes != 0) {
      return with_widest_access<T, kBytes / 2>(run, pointers...);
    }
  }
  run(std::integral_constant<int, kBytes / sizeof(T)>{});
}

#if defined(__CUDACC__)
// Bytes of the widest access that pays on the current device: from sm_100 on there are such of 32.
inline uintptr_t widest_access() {
  static const std::vector<uintptr_t> of_devices = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<uintptr_t> found(count, 16);
    for (int device = 0; device < count; device++) {
      int major = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      found[device] = major < 10 ? 16 : 32;
    }
    return found;
  }();
  int device = 0;
  cudaGetDevice(&device);
  return device < static_cast<int>(of_devices.size()) ? of_devices[device] : 16;
}

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

}  // namespace fused_act
