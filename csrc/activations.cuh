// The activations: forward and derivative of one element, in fp32, one struct each.
//
// The derivative is one of x, or of y where that is saved (derivative_from_output). Where a mask is
// saved, `passes` tells of x whether the gradient passes, and `gradient` what comes through.
// Where the parameter is a learnable weight, `weight_gradient` is what an element adds to its
// gradient.
//
// T is the tensor's element. 16-bit results need fewer bits: there e^x is scaled by 2^32, so that
// it does not underflow before the product with x does. fp32 has no bits to spare for the larger
// argument; below -87, where e^x is subnormal and flushes, it takes e^(x/2) twice.
// fused_act/backends/triton/activations.py states the same math; tests hold both to a float64
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
      // x and e are used up before r is there, which takes fewer registers.
      const float n = fmaf(e, e, e * 0x1p33f);
      const float r = reciprocal_approx(n + 0x1p65f);
      return r * fmaf((clamped * fmaf(e, -0x1p32f, n)) * r, 0x1p66f, n);
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
  __host__ __device__ Sum argument(float x, float minimum = -240.0f, float maximum = 128.0f) const {
    const float z = x * beta;
    const float clamped = clamp(z, minimum, maximum);
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
      return (r * fmaf(z * e, r, 1.0f)) * 0x1p-32f;
    } else {
      const auto [z, z_low] = argument(x);
      const bool tail = z < kTail;
      const float scale = tail ? 0.5f : -1.0f;
      const float e = exp_compensated(scale * z, scale * z_low);
      const float s = reciprocal_approx(1.0f + e);
      return tail ? ((1.0f + z) * e) * e : s * fmaf(z, e * s, 1.0f);
    }
  }

  // With a learnable beta: x^2 s (1 - s) is the square of u = x h / (1 + h^2) with h = e^(-|z| /
  // 2). A factor at a time, or 0 times infinity would come of a large x. In the tail of fp32 u is x
  // h, where h = e^(-|z| / 4) twice does not flush early.
  __host__ __device__ float weight_gradient(float grad_output, float x) const {
    float u;
    if constexpr (kLow) {
      const float h = exp2_approx(-fabsf(x * (beta * (0.5f * kLog2e))));
      u = x * (h * reciprocal_approx(fmaf(h, h, 1.0f)));
    } else {
      const auto [z, z_low] = argument(x, -480.0f, 480.0f);
      const bool tail = fabsf(z) > -kTail;
      const float half = tail ? 0.25f : 0.5f;
      const float scale = z > 0.0f ? -half : half;
      const float h = exp_compensated(scale * z, scale * z_low);
      u = (x * h) * (tail ? h : reciprocal_approx(fmaf(h, h, 1.0f)));
    }
    return (grad_output * u) * u;
  }
};

// y = min(max(x, 0), 6), arXiv:1704.04861:   y' = 0 where x <= 0 or x >= 6, else 1.
template <typename T>
struct ReLU6 {
  __host__ __device__ float forward(float x) const { return clamp(x, 0.0f, 6.0f); }

  // NaN compares false and passes the gradient on, as in torch's CUDA kernel.
  __host__ __device__ bool passes(float x) const { return !(x <= 0.0f || x >= 6.0f); }

  // Not a product: a gradient of inf or NaN that does not pass leaves 0.
  __host__ __device__ float gradient(float grad_output, bool passes) const {
    return passes ? grad_output : 0.0f;
  }
};

// y = max(x, 0):   y' = 0 where x <= 0, else 1.
template <typename T>
struct ReLU {
  __host__ __device__ float forward(float x) const { return clamp_min(x, 0.0f); }

  __host__ __device__ bool passes(float x) const { return !(x <= 0.0f); }

  __host__ __device__ float gradient(float grad_output, bool passes) const {
    return passes ? grad_output : 0.0f;
  }
};

// y = x where x > 0, else slope x:   y' = 1 or slope.
template <typename T>
struct LeakyReLU {
  float negative_slope;

  __host__ __device__ float forward(float x) const { return x > 0.0f ? x : x * negative_slope; }

  __host__ __device__ bool passes(float x) const { return x > 0.0f; }

  __host__ __device__ float gradient(float grad_output, bool passes) const {
    return passes ? grad_output : grad_output * negative_slope;
  }
};

// y = x where x > 0, else weight x, arXiv:1502.01852:   y' = 1 or weight.
template <typename T>
struct PReLU {
  float weight;

  __host__ __device__ float forward(float x) const { return x > 0.0f ? x : x * weight; }

  __host__ __device__ float derivative(float x) const { return x > 0.0f ? 1.0f : weight; }

  // Not a product with 0: a gradient of inf or NaN that does not reach the weight leaves 0.
  __host__ __device__ float weight_gradient(float grad_output, float x) const {
    return x > 0.0f ? 0.0f : grad_output * x;
  }
};

// y = 1 / (1 + e^-x):   y' = y (1 - y).
template <typename T>
struct Sigmoid {
  __host__ __device__ float forward(float x) const {
    if constexpr (sizeof(T) == 2) {
      const float e = exp2_approx(fmaf(x, -kLog2e, -32.0f));
      return reciprocal_approx(e + 0x1p-32f) * 0x1p-32f;
    } else {
      const float clamped = clamp(x, -240.0f, 128.0f);
      const bool tail = clamped < kTail;
      const float e = exp_compensated(clamped * (tail ? 0.5f : -1.0f), 0.0f);
      return tail ? e * e : reciprocal_approx(1.0f + e);
    }
  }

  __host__ __device__ float derivative_from_output(float y) const { return fmaf(-y, y, y); }
};

// y = tanh(x) = +-(1 - 2 / (e^2|x| + 1)), which cancels near 0: there a polynomial in x^2 takes its
// place, of the least relative error.   y' = 1 - y^2.
template <typename T>
struct Tanh {
  __host__ __device__ float forward(float x) const {
    const float square = x * x;
    float near, p;
    if constexpr (sizeof(T) == 2) {
      near = 0.25f;
      p = fmaf(square, -0.05197500497256537f, 0.13328699419200996f);
      p = fmaf(square, p, -0.33333317268234397f);
    } else {
      near = 0.55f;
      p = fmaf(square, -0.006610415440954851f, 0.02130950539575405f);
      p = fmaf(square, p, -0.053909451968851926f);
      p = fmaf(square, p, 0.1333311388368493f);
      p = fmaf(square, p, -0.33333332010104344f);
    }
    const float e = exp2_approx(fabsf(x) * (2.0f * kLog2e));
    const float far = copysignf(1.0f - 2.0f * reciprocal_approx(e + 1.0f), x);
    return fabsf(x) < near ? fmaf(x * square, p, x) : far;
  }

  __host__ __device__ float derivative_from_output(float y) const { return fmaf(-y, y, 1.0f); }
};

// y = scale x where x > 0, else scale alpha (e^x - 1), arXiv:1706.02515. Near 0 e^x - 1 cancels:
// there a polynomial takes its place, of the least relative error.
// y' = scale, or scale alpha e^x = y + scale alpha. This sum cancels for a rounded y.
template <typename T>
struct SELU {
  static constexpr bool kLow = sizeof(T) == 2;
  static constexpr float kScale = 1.0507009873554804934193349852946f;
  static constexpr float kScaleAlpha = 1.7580993408473768599402175208123f;
  static constexpr float kScaleAlphaLow = 2.3296717680252717521e-8f;  // what that leaves out

  __host__ __device__ float forward(float x) const {
    float near, p;
    if constexpr (kLow) {
      near = -0.125f;
      p = fmaf(x, 0.04013757579362166f, 0.16659526492959045f);
      p = fmaf(x, p, 0.49999950189409315f);
    } else {
      near = -0.8f;
      p = fmaf(x, 0.00014742328462483088f, 0.0013450949514120594f);
      p = fmaf(x, p, 0.00831544933897447f);
      p = fmaf(x, p, 0.04166331433496412f);
      p = fmaf(x, p, 0.16666643415648477f);
      p = fmaf(x, p, 0.4999999973526102f);
    }
    const float negative = x > near ? fmaf(x * x, p, x) : exp2_approx(x * kLog2e) - 1.0f;
    return x > 0.0f ? kScale * x : kScaleAlpha * negative;
  }

  __host__ __device__ float derivative(float x) const {
    float negative;
    if constexpr (kLow) {
      negative = exp2_approx(fmaf(x, kLog2e, 32.0f)) * (kScaleAlpha * 0x1p-32f);
    } else {
      const float clamped = clamp(x, -240.0f, 0.0f);
      const bool tail = clamped < kTail;
      const float e = exp_compensated(tail ? 0.5f * clamped : clamped, 0.0f);
      negative = (kScaleAlpha * e) * (tail ? e : 1.0f);
    }
    return x > 0.0f ? kScale : negative;
  }

  __host__ __device__ float derivative_from_output(float y) const {
    return y > 0.0f ? kScale : (y + kScaleAlpha) + kScaleAlphaLow;
  }
};

}  // namespace fused_act
