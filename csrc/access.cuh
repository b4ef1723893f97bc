// How a thread reads and writes memory: vectors of elements, converted from and to fp32, and the
// bits of a mask. Every family includes this; nothing here knows one, nor an activation.
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

// Threads of a block, but for a kernel that says otherwise.
constexpr int kThreads = 256;

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

// Likewise where the first addresses are those of rows of `columns` elements, one after the other.
template <typename T, typename Run, typename... Pointers>
void with_widest_access_to_rows(Run run, int64_t columns, Pointers... pointers) {
  with_widest_access<T, 16>(run, static_cast<uintptr_t>(columns * sizeof(T)), pointers...);
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
#endif

}  // namespace fused_act
