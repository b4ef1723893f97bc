// The activations: forward and derivative of one element, in fp32, one struct each.
//
// T is the tensor's element. 16-bit results need fewer bits: there e^x is scaled by 2^32, so that
// it does not underflow before the product with x does. fp32 has no bits to spare for the larger
// argument; below -87, where e^x is subnormal and flushes, it takes e^(x/2) twice.
// fused_act/backends/triton_activations.py states the same math; tests hold both to a float64
// oracle.
#pragma once

#include "math.cuh"

namespace fused_act {

constexpr float kTail = -87.0f;

// y = x * tanh(softplus(x)), arXiv:1908.08681. With e = e^x, n = e (e + 2), r = 1 / (n + 2):
//   y = x n r,   y' = r (n + 4 x r (e^2 + e)).
// In the tail both are proportional to e, in fp32 even with h = e^(x/2) in its place: so take the
// result with h, times h. A select between two results would become a branch around the longer one.
template <typename T>
struct Mish {
  static constexpr bool kLow = sizeof(T) == 2;

  __host__ __device__ float forward(float x) const {
    if constexpr (kLow) {
      const float e = exp2_approx(fmaf(clamp_max(x, 20.0f), kLog2e, 32.0f));
      const float n = e * (e + 0x1p33f);
      return x * (n * reciprocal_approx(n + 0x1p65f));
    } else {
      const float clamped = clamp(x, -240.0f, 20.0f);
      const bool tail = clamped < kTail;
      const float e = exp_compensated(tail ? 0.5f * clamped : clamped, 0.0f);
      const float n = fmaf(e, e, e + e);
      const float gate = quotient(n, n + 2.0f, reciprocal_approx(n + 2.0f));
      return (x * gate) * (tail ? e : 1.0f);
    }
  }

  __host__ __device__ float derivative(float x) const {
    if constexpr (kLow) {
      const float clamped = clamp_max(x, 20.0f);
      const float e = exp2_approx(fmaf(clamped, kLog2e, 32.0f));
      const float n = e * (e + 0x1p33f);
      const float r = reciprocal_approx(n + 0x1p65f);
      return r * fmaf((clamped * r) * (e * (e + 0x1p32f)), 0x1p66f, n);
    } else {
      const float clamped = clamp(x, -240.0f, 20.0f);
      const bool tail = clamped < kTail;
      const float e = exp_compensated(tail ? 0.5f * clamped : clamped, 0.0f);
      const float n = fmaf(e, e, e + e);
      const float r = reciprocal_approx(n + 2.0f);
      const float numerator = fmaf(4.0f * clamped * r, fmaf(e, e, e), n);
      return quotient(numerator, n + 2.0f, r) * (tail ? e : 1.0f);
    }
  }
};

// y = x s with z = beta x and s = 1 / (1 + e^-z), arXiv:1710.05941:   y' = s (1 + z (1 - s)).
template <typename T>
struct Swish {
  static constexpr bool kLow = sizeof(T) == 2;
  float beta;

  struct Sum {
    float high, low;
  };

  // beta x, clamped to where the exponential is finite, and what rounding took from it: without
  // that the result is off by beta x / 2 ULP.
  __host__ __device__ Sum argument(float x) const {
    const float z = x * beta;
    const float clamped = clamp(z, -240.0f, 128.0f);
    return {clamped, clamped == z ? fmaf(x, beta, -z) : 0.0f};
  }

  __host__ __device__ float forward(float x) const {
    if constexpr (kLow) {
      const float e = exp2_approx(fmaf(x, beta * -kLog2e, -32.0f));
      return x * (reciprocal_approx(e + 0x1p-32f) * 0x1p-32f);
    } else {
      const auto [z, z_low] = argument(x);
      const bool tail = z < kTail;
      const float scale = tail ? 0.5f : -1.0f;
      const float e = exp_compensated(scale * z, scale * z_low);
      return tail ? (x * e) * e : x * reciprocal_approx(1.0f + e);
    }
  }

  __host__ __device__ float derivative(float x) const {
    if constexpr (kLow) {
      const float z = clamp(x * beta, -104.0f, 104.0f);
      const float e = exp2_approx(fmaf(z, -kLog2e, -32.0f));
      const float r = reciprocal_approx(e + 0x1p-32f);
      return (r * fmaf(z, e * r, 1.0f)) * 0x1p-32f;
    } else {
      const auto [z, z_low] = argument(x);
      const bool tail = z < kTail;
      const float scale = tail ? 0.5f : -1.0f;
      const float e = exp_compensated(scale * z, scale * z_low);
      const float s = reciprocal_approx(1.0f + e);
      return tail ? ((1.0f + z) * e) * e : s * fmaf(z, e * s, 1.0f);
    }
  }
};

// y = min(max(x, 0), 6), arXiv:1704.04861:   y' = 0 where x <= 0 or x >= 6, else 1.
template <typename T>
struct ReLU6 {
  __host__ __device__ float forward(float x) const { return clamp(x, 0.0f, 6.0f); }

  // NaN compares false and passes the gradient on, as in torch's CUDA kernel. A cast, since a
  // choice between 0 and 1 would be made and then compared again for the mask.
  __host__ __device__ float derivative(float x) const {
    return static_cast<float>(!(x <= 0.0f || x >= 6.0f));
  }
};

}  // namespace fused_act
