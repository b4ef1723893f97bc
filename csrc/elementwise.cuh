// The loops: one tile of a tensor per thread block, in memory order, forward and backward.
//
// What a thread does is a __host__ __device__ function of its block and thread index, so that tests
// run the index arithmetic on the host. Nothing here knows an activation.
#pragma once

#include <cstdint>
#include <type_traits>

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
// Per thread and input, all in flight at once: enough to keep a Hopper SM's memory busy.
constexpr int kBytesPerThread = 32;

// Bytes that an access of a thread can move. Elsewhere two accesses of 16 bytes in a row would each
// leave half of every sector untouched, so there a kernel for 32 is that for 16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr int kWidestAccess = 16;
#else
constexpr int kWidestAccess = 32;
#endif

// Blocks per SM that backward is compiled for: 40 registers a thread. With 64 bytes of each that is
// 96 KiB in flight, where a Hopper SM wants 48 and a Blackwell 64.
constexpr int kBackwardBlocks = 6;

template <typename T>
constexpr int kElementsPerThread = kBytesPerThread / sizeof(T);

template <typename T>
constexpr int kTile = kThreads * kElementsPerThread<T>;

// What one access moves: kWidth elements.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T elements[kWidth];
};

// The width of the accesses that a kernel for kWidth makes.
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

// The elements of one thread: runs of kRun consecutive ones, the threads' runs side by side, so
// that a warp's accesses coalesce. A mask byte holds the bits of 8 elements, so with a mask a run
// is 8.
template <typename T, int kWidth, bool kMasked>
struct Runs {
  static constexpr int kRun = kMasked && kWidth < 8 ? 8 : kWidth;
  static constexpr int kCount = kElementsPerThread<T> / kRun;
  static constexpr int kStride = kThreads * kRun;  // from one run of a thread to its next
  static_assert(kCount * kRun == kElementsPerThread<T> && kRun % kWidth == 0);
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

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void load_relaxed(const void* source, uint32_t (&words)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(__cvta_generic_to_global(source)));
}

__device__ __forceinline__ void load_relaxed(const void* source, uint32_t (&words)[8]) {
  asm volatile("ld.relaxed.gpu.global.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]), "=r"(words[4]),
                 "=r"(words[5]), "=r"(words[6]), "=r"(words[7])
               : "l"(__cvta_generic_to_global(source)));
}
#endif

// Load one access into fp32, no later than the next such load. The compiler moves plain loads to
// where they are used when it is short of registers; of relaxed ones it keeps the order.
template <int kWidth, typename T>
__host__ __device__ __forceinline__ void load_in_order(const T* source, float (&values)[kWidth]) {
  using Access = Vector<T, kWidth>;
#if defined(__CUDA_ARCH__)
  constexpr bool kRelaxed = sizeof(Access) >= 16;
#else
  constexpr bool kRelaxed = false;
#endif
  if constexpr (kRelaxed) {
    alignas(Access) uint32_t words[sizeof(Access) / 4];
    load_relaxed(source, words);
    to_floats(*reinterpret_cast<const Access*>(words), values);
  } else {
    load<kWidth>(source, values);
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

// What one thread does in a full tile.
template <int kWidth, bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void forward_tile(Activation activation, const T* x, T* y,
                                                      uint8_t* mask, int thread) {
  using R = Runs<T, kWidth, kMasked>;
  x += thread * R::kRun;
  y += thread * R::kRun;
  // All loads come before all math: x and y may be the same memory, so the compiler cannot do it.
  float values[R::kCount][R::kRun];
#pragma unroll
  for (int run = 0; run < R::kCount; run++) {
    load<kWidth>(x + run * R::kStride, values[run]);
  }
  if constexpr (kMasked) {
    mask += thread * (R::kRun / 8);
#pragma unroll
    for (int run = 0; run < R::kCount; run++) {
#pragma unroll
      for (int i = 0; i < R::kRun; i += 8) {
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          bits = or_if(activation.passes(values[run][i + j]), bits, 1u << j);
        }
        mask[(run * R::kStride + i) / 8] = static_cast<uint8_t>(bits);
      }
    }
  }
#pragma unroll
  for (int run = 0; run < R::kCount; run++) {
    float results[R::kRun];
#pragma unroll
    for (int i = 0; i < R::kRun; i++) {
      results[i] = activation.forward(values[run][i]);
    }
    store<kWidth>(y + run * R::kStride, results);
  }
}

template <int kWidth, bool kMasked, typename Activation, typename T, typename Saved>
__host__ __device__ __forceinline__ void backward_tile(Activation activation, const T* grad_output,
                                                       const Saved* saved, T* grad_input,
                                                       int thread) {
  using R = Runs<T, kWidth, kMasked>;
  grad_output += thread * R::kRun;
  grad_input += thread * R::kRun;
  saved += thread * (kMasked ? R::kRun / 8 : R::kRun);
  float grads[R::kCount][R::kRun];
  float values[R::kCount][R::kRun];
  unsigned bits[R::kCount] = {};
  if constexpr (kMasked) {
#pragma unroll
    for (int run = 0; run < R::kCount; run++) {
      load<kWidth>(grad_output + run * R::kStride, grads[run]);
#pragma unroll
      for (int i = 0; i < R::kRun; i += 8) {
        bits[run] |= static_cast<unsigned>(saved[(run * R::kStride + i) / 8]) << i;
      }
    }
  } else {
    // The math begins with the values of the first run, so they come last.
#pragma unroll
    for (int run = R::kCount - 1; run >= 0; run--) {
      load_in_order<kWidth>(grad_output + run * R::kStride, grads[run]);
    }
#pragma unroll
    for (int run = R::kCount - 1; run >= 0; run--) {
      load_in_order<kWidth>(saved + run * R::kStride, values[run]);
    }
  }
#pragma unroll
  for (int run = 0; run < R::kCount; run++) {
    float results[R::kRun];
#pragma unroll
    for (int i = 0; i < R::kRun; i++) {
      if constexpr (kMasked) {
        results[i] = activation.gradient(grads[run][i], bits[run] >> i & 1);
      } else {
        results[i] = grads[run][i] * activation.derivative(values[run][i]);
      }
    }
    store<kWidth>(grad_input + run * R::kStride, results);
  }
}

// What one thread does in the last tile, of `left` elements: eight at a time, one after the other,
// so that this rare path does not cost registers in all the others.
template <bool kMasked, typename Activation, typename T>
__host__ __device__ __forceinline__ void forward_tail(Activation activation, const T* x, T* y,
                                                      uint8_t* mask, int left, int thread) {
#pragma unroll 1
  for (int offset = 8 * thread; offset < left; offset += 8 * kThreads) {
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

template <bool kMasked, typename Activation, typename T, typename Saved>
__host__ __device__ __forceinline__ void backward_tail(Activation activation, const T* grad_output,
                                                       const Saved* saved, T* grad_input, int left,
                                                       int thread) {
#pragma unroll 1
  for (int i = thread; i < left; i += kThreads) {
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
    forward_tail<kMasked>(activation, x + start, y + start, mask, static_cast<int>(left), thread);
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
    backward_tail<kMasked>(activation, grad_output, saved, grad_input, static_cast<int>(left),
                           thread);
  }
}

template <typename T>
int64_t block_count(int64_t numel) {
  return (numel + kTile<T> - 1) / kTile<T>;
}

// Call `run` with the widest access, of kBytes at most, that all the addresses allow.
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
template <int kWidth, bool kMasked, typename Activation, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Activation activation, const T* x, T* y, uint8_t* mask, int64_t numel) {
  forward_thread<kAccess<T, kWidth>, kMasked>(activation, x, y, mask, numel, blockIdx.x,
                                              threadIdx.x);
}

template <int kWidth, bool kMasked, typename Activation, typename T, typename Saved>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(Activation activation, const T* grad_output, const Saved* saved, T* grad_input,
                    int64_t numel) {
  backward_thread<kAccess<T, kWidth>, kMasked>(activation, grad_output, saved, grad_input, numel,
                                               blockIdx.x, threadIdx.x);
}

template <bool kMasked, typename Activation, typename T>
void launch_forward(Activation activation, const T* x, T* y, uint8_t* mask, int64_t numel,
                    cudaStream_t stream) {
  with_widest_access<T>(
      [&](auto width) {
        forward_kernel<decltype(width)::value, kMasked>
            <<<block_count<T>(numel), kThreads, 0, stream>>>(activation, x, y, mask, numel);
      },
      x, y);
}

template <bool kMasked, typename Activation, typename T, typename Saved>
void launch_backward(Activation activation, const T* grad_output, const Saved* saved, T* grad_input,
                     int64_t numel, cudaStream_t stream) {
  auto launch = [&](auto width) {
    backward_kernel<decltype(width)::value, kMasked>
        <<<block_count<T>(numel), kThreads, 0, stream>>>(activation, grad_output, saved, grad_input,
                                                         numel);
  };
  if constexpr (kMasked) {
    with_widest_access<T>(launch, grad_output, grad_input);  // the mask is read by the byte
  } else {
    with_widest_access<T>(launch, grad_output, saved, grad_input);
  }
}
#endif

}  // namespace fused_act
