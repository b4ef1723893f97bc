// The few functions that differ between the GPU and a host that stands in for it: tests run the
// activations and the loops as plain C++, where a correctly rounded function takes the place of an
// approximate instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(__CUDACC__)
#define __host__
#define __device__
#define __forceinline__ inline
#endif

namespace fused_act {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2eLow = 1.92596299112661746887e-8f;  // log2(e) less what fp32 holds of it
constexpr float kLn2 = 0.6931471805599453f;

#if !defined(__CUDA_ARCH__)
// The errors that a host run adds to 2^x and 1 / x, in ULP. The tests set them to what the hardware
// may be off by: 2 and 1.
inline int exp2_error = 0;
inline int reciprocal_error = 0;

inline float add_ulps(float x, int ulps) {
  if (!std::isnormal(x)) {
    return x;
  }
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits += ulps;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

inline float flush_subnormal(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}
#endif

// 2^x within 2 ULP; subnormal results flush. One instruction, where exp2f takes four.
__host__ __device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = static_cast<float>(std::exp2(static_cast<double>(x)));
  return flush_subnormal(add_ulps(y, exp2_error));
#endif
}

// 1 / x within 1 ULP. One instruction, where a division takes eight.
__host__ __device__ __forceinline__ float reciprocal_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = static_cast<float>(1.0 / static_cast<double>(flush_subnormal(x)));
  return flush_subnormal(add_ulps(y, reciprocal_error));
#endif
}

// fminf and fmaxf swallow NaN; these let it through, in one instruction as well.
__host__ __device__ __forceinline__ float clamp_max(float x, float maximum) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(maximum));
  return y;
#else
  return x > maximum ? maximum : x;
#endif
}

__host__ __device__ __forceinline__ float clamp_min(float x, float minimum) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(minimum));
  return y;
#else
  return x < minimum ? minimum : x;
#endif
}

__host__ __device__ __forceinline__ float clamp(float x, float minimum, float maximum) {
  return clamp_max(clamp_min(x, minimum), maximum);
}

// bits, with `bit` set if `condition` holds: one instruction under a predicate, where the compiler
// takes a select and half an addition.
__host__ __device__ __forceinline__ unsigned or_if(bool condition, unsigned bits, unsigned bit) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.ne.u32 p, %1, 0; @p or.b32 %0, %0, %2;}"
      : "+r"(bits)
      : "r"(static_cast<unsigned>(condition)), "r"(bit));
  return bits;
#else
  return condition ? bits | bit : bits;
#endif
}

// a / b, where r is about 1 / b: what rounding and r are off by is computed and put back.
__host__ __device__ __forceinline__ float quotient(float a, float b, float r) {
  const float q = a * r;
  return fmaf(fmaf(-q, b, a), r, q);
}

// e^(x + x_low) within 3 ULP: the rounding error of x * log2(e) is computed and put back.
__host__ __device__ __forceinline__ float exp_compensated(float x, float x_low) {
  const float t = x * kLog2e;
  // t - x log2(e): of its negative the compiler would make a second product.
  const float excess = fmaf(x, -kLog2e, t);
  const float t_low = fmaf(x, kLog2eLow, -excess);
  const float e = exp2_approx(t);
  return fmaf(e, fmaf(t_low, kLn2, x_low), e);
}

}  // namespace fused_act
