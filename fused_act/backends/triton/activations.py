"""The Triton pairs: `forward` and `derivative` of one element, in fp32, for each activation.

The derivative is one of x, or of y where that is saved (`derivative_from_output`). Where a mask is
saved, `passes` tells of x whether the gradient passes, and `gradient` what comes through.
Where there is a weight, `weight_gradient` is what an element adds to the gradient of its weight.

`LOW` is true for 16-bit tensors, whose results need fewer bits: there e^x is scaled by 2^32, so
that it does not underflow before the product with x does. fp32 has no bits to spare for the larger
argument; below -87, where e^x is subnormal and flushes, it takes e^(x/2) twice, and it puts the
rounding error of x * log2(e) back. The tail costs 16-bit Mish 0.1 instructions an element and Swish
1, in fp32 4 to 7; putting errors back costs 5 to 9 (sm_90). csrc/activations.cuh states the same
math; tests hold both to a float64 oracle.
"""

from typing import Any

import triton
import triton.language as tl

from fused_act.backends.triton.math import (
    LOG2E,
    clamp,
    clamp_max,
    exp2_approx,
    exp_compensated,
    fma,
    product_error,
    quotient,
    reciprocal_approx,
)
from fused_act.families.base import Row

TAIL = tl.constexpr(-87.0)
TWO_32 = tl.constexpr(4294967296.0)
TWO_33 = tl.constexpr(8589934592.0)
TWO_65 = tl.constexpr(36893488147419103232.0)
TWO_66 = tl.constexpr(73786976294838206464.0)
SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
SELU_SCALE_ALPHA = tl.constexpr(1.7580993408473768599402175208123)
SELU_SCALE_ALPHA_HIGH = tl.constexpr(1.7580993175506591796875)  # that in fp32
SELU_SCALE_ALPHA_LOW = tl.constexpr(2.3296717680252717521e-8)  # what that leaves out


# In the tail results are proportional to e^x, in fp32 even with h = e^(x/2) in its place: so take
# the result with h, times h.
@triton.jit
def mish_forward(x, LOW: tl.constexpr):
    if LOW:
        e = exp2_approx(clamp_max(x, 20.0) * LOG2E + 32.0)
        n = e * (e + TWO_33)
        return x * (n * reciprocal_approx(n + TWO_65))
    else:
        clamped = clamp(x, -240.0, 20.0)
        tail = clamped < TAIL
        e = exp_compensated(tl.where(tail, 0.5 * clamped, clamped), 0.0)
        n = tl.fma(e, e, e + e)
        gate = quotient(n, n + 2.0, reciprocal_approx(n + 2.0))
        return (x * gate) * tl.where(tail, e, 1.0)


@triton.jit
def mish_derivative(x, LOW: tl.constexpr):
    if LOW:
        clamped = clamp_max(x, 20.0)
        e = exp2_approx(clamped * LOG2E + 32.0)
        # x and e are used up before r is there, which takes fewer registers.
        n = tl.fma(e, e, e * TWO_33)
        r = reciprocal_approx(n + TWO_65)
        return r * tl.fma((clamped * tl.fma(e, -TWO_32, n)) * r, TWO_66, n)
    else:
        clamped = clamp(x, -240.0, 20.0)
        tail = clamped < TAIL
        e = exp_compensated(tl.where(tail, 0.5 * clamped, clamped), 0.0)
        n = tl.fma(e, e, e + e)
        r = reciprocal_approx(n + 2.0)
        numerator = tl.fma(4.0 * clamped * r, tl.fma(e, e, e), n)
        return quotient(numerator, n + 2.0, r) * tl.where(tail, e, 1.0)


@triton.jit
def swish_argument(x, beta, minimum, maximum):
    """beta x, clamped to where the exponential is finite, and what rounding took from it.

    Without the latter the result is off by beta x / 2 ULP.
    """
    z = x * beta
    clamped = clamp(z, minimum, maximum)
    return clamped, tl.where(clamped == z, product_error(x, beta, z), 0.0)


@triton.jit
def swish_forward(x, beta, LOW: tl.constexpr):
    if LOW:
        e = exp2_approx(x * (beta * -LOG2E) - 32.0)
        return x * (reciprocal_approx(e + 1.0 / TWO_32) * (1.0 / TWO_32))
    else:
        z, z_low = swish_argument(x, beta, -240.0, 128.0)
        tail = z < TAIL
        scale = tl.where(tail, 0.5, -1.0)
        e = exp_compensated(scale * z, scale * z_low)
        return tl.where(tail, (x * e) * e, x * reciprocal_approx(1.0 + e))


@triton.jit
def swish_derivative(x, beta, LOW: tl.constexpr):
    if LOW:
        z = clamp(x * beta, -104.0, 104.0)
        e = exp2_approx(z * -LOG2E - 32.0)
        r = reciprocal_approx(e + 1.0 / TWO_32)
        return (r * tl.fma(z * e, r, 1.0)) * (1.0 / TWO_32)
    else:
        z, z_low = swish_argument(x, beta, -240.0, 128.0)
        tail = z < TAIL
        scale = tl.where(tail, 0.5, -1.0)
        e = exp_compensated(scale * z, scale * z_low)
        s = reciprocal_approx(1.0 + e)
        return tl.where(tail, ((1.0 + z) * e) * e, s * tl.fma(z, e * s, 1.0))


# x^2 s (1 - s) is the square of u = x h / (1 + h^2) with h = e^(-|z| / 2). A factor at a time, or 0
# times infinity would come of a large x.
@triton.jit
def swish_weight_gradient(grad_output, x, beta, LOW: tl.constexpr):
    if LOW:
        h = exp2_approx(-tl.abs(x * (beta * (0.5 * LOG2E))))
        u = x * (h * reciprocal_approx(tl.fma(h, h, 1.0)))
    else:
        # In the tail u is x h, where h = e^(-|z| / 4) twice does not flush early.
        z, z_low = swish_argument(x, beta, -480.0, 480.0)
        tail = tl.abs(z) > -TAIL
        scale = tl.where(tail, 0.25, 0.5)
        scale = tl.where(z > 0.0, -scale, scale)
        h = exp_compensated(scale * z, scale * z_low)
        u = (x * h) * tl.where(tail, h, reciprocal_approx(tl.fma(h, h, 1.0)))
    return (grad_output * u) * u


@triton.jit
def prelu_forward(x, weight, LOW: tl.constexpr):
    return x * tl.where(x > 0.0, 1.0, weight)


@triton.jit
def prelu_derivative(x, weight, LOW: tl.constexpr):
    return tl.where(x > 0.0, 1.0, weight)


@triton.jit
def prelu_weight_gradient(grad_output, x, weight, LOW: tl.constexpr):
    # Not a product with 0: a gradient of inf or NaN that does not reach the weight leaves 0.
    return tl.where(x > 0.0, 0.0, grad_output * x)


@triton.jit
def relu6_forward(x, LOW: tl.constexpr):
    return clamp(x, 0.0, 6.0)


@triton.jit
def relu6_passes(x):
    # NaN compares false and passes the gradient on, as in torch's CUDA kernel.
    return ((x <= 0.0) | (x >= 6.0)) == 0


@triton.jit
def relu6_gradient(grad_output, passes):
    # Not a product: a gradient of inf or NaN that does not pass leaves 0.
    return tl.where(passes, grad_output, 0.0)


@triton.jit
def relu_forward(x, LOW: tl.constexpr):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_passes(x):
    return (x <= 0.0) == 0  # NaN passes


@triton.jit
def relu_gradient(grad_output, passes):
    return tl.where(passes, grad_output, 0.0)


@triton.jit
def leaky_relu_forward(x, negative_slope, LOW: tl.constexpr):
    return x * tl.where(x > 0.0, 1.0, negative_slope)


@triton.jit
def leaky_relu_passes(x):
    return x > 0.0


@triton.jit
def leaky_relu_gradient(grad_output, passes, negative_slope):
    return grad_output * tl.where(passes, 1.0, negative_slope)


@triton.jit
def sigmoid_forward(x, LOW: tl.constexpr):
    if LOW:
        e = exp2_approx(x * -LOG2E - 32.0)
        return reciprocal_approx(e + 1.0 / TWO_32) * (1.0 / TWO_32)
    else:
        clamped = clamp(x, -240.0, 128.0)
        tail = clamped < TAIL
        e = exp_compensated(clamped * tl.where(tail, 0.5, -1.0), 0.0)
        return tl.where(tail, e * e, reciprocal_approx(1.0 + e))


@triton.jit
def sigmoid_derivative_from_output(y, LOW: tl.constexpr):
    return fma(-y, y, y)


# 1 - 2 / (e^2|x| + 1) cancels near 0: there a polynomial in x^2 takes its place.
@triton.jit
def tanh_forward(x, LOW: tl.constexpr):
    square = x * x
    if LOW:
        near = tl.abs(x) < 0.25
        p = tl.fma(square, -0.05197500497256537, 0.13328699419200996)
        p = tl.fma(square, p, -0.33333317268234397)
    else:
        near = tl.abs(x) < 0.55
        p = tl.fma(square, -0.006610415440954851, 0.02130950539575405)
        p = tl.fma(square, p, -0.053909451968851926)
        p = tl.fma(square, p, 0.1333311388368493)
        p = tl.fma(square, p, -0.33333332010104344)
    far = 1.0 - 2.0 * reciprocal_approx(exp2_approx(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(near, tl.fma(x * square, p, x), tl.where(x < 0.0, -far, far))


@triton.jit
def tanh_derivative_from_output(y, LOW: tl.constexpr):
    return fma(-y, y, tl.full((), 1.0, tl.float32))


# e^x - 1 cancels near 0: there a polynomial takes its place. From a rounded y, the sum with
# SCALE ALPHA cancels, so that takes a second part.
@triton.jit
def selu_forward(x, LOW: tl.constexpr):
    if LOW:
        near = x > -0.125
        p = tl.fma(x, 0.04013757579362166, 0.16659526492959045)
        p = tl.fma(x, p, 0.49999950189409315)
    else:
        near = x > -0.8
        p = tl.fma(x, 0.00014742328462483088, 0.0013450949514120594)
        p = tl.fma(x, p, 0.00831544933897447)
        p = tl.fma(x, p, 0.04166331433496412)
        p = tl.fma(x, p, 0.16666643415648477)
        p = tl.fma(x, p, 0.4999999973526102)
    negative = tl.where(near, tl.fma(x * x, p, x), exp2_approx(x * LOG2E) - 1.0)
    return tl.where(x > 0.0, SELU_SCALE * x, SELU_SCALE_ALPHA * negative)


@triton.jit
def selu_derivative(x, LOW: tl.constexpr):
    if LOW:
        negative = exp2_approx(x * LOG2E + 32.0) * (SELU_SCALE_ALPHA / TWO_32)
    else:
        clamped = clamp(x, -240.0, 0.0)
        tail = clamped < TAIL
        e = exp_compensated(tl.where(tail, 0.5 * clamped, clamped), 0.0)
        negative = (SELU_SCALE_ALPHA * e) * tl.where(tail, e, 1.0)
    return tl.where(x > 0.0, SELU_SCALE, negative)


@triton.jit
def selu_derivative_from_output(y, LOW: tl.constexpr):
    return tl.where(y > 0.0, SELU_SCALE, (y + SELU_SCALE_ALPHA_HIGH) + SELU_SCALE_ALPHA_LOW)


def functions_of(row: Row, *names: str | None) -> list[Any]:
    """The functions called `names` of the pair that `row` takes. None is what it does not need."""
    return [name and globals()[f"{row.pair.name}_{name}"] for name in names]
