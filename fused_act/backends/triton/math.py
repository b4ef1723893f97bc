"""The functions that the activations are made of, where Triton's own take more instructions.

csrc/math.cuh has the same.
"""

import triton
import triton.language as tl

# The interpreter cannot run inline assembly: it takes exact functions instead.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_HIGH = tl.constexpr(1.44269502162933349609375)  # LOG2E in fp32
LOG2E_LOW = tl.constexpr(1.92596299112661746887e-8)  # what that leaves out
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2_approx(x):
    """2^x within 2 ULP; subnormal results flush. One instruction, where tl.exp2 takes four."""
    if INTERPRET:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal_approx(x):
    """1 / x within 1 ULP. One instruction, where a division takes eight."""
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def fma(a, b, c):
    """a b + c, rounded once, for a c that may cancel a b."""
    if INTERPRET:  # its tl.fma rounds twice
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def product_error(a, b, product):
    """What rounding took from the product of a and b."""
    if INTERPRET:  # where a scalar is a Python float
        b += tl.full((), 0.0, tl.float32)
    return fma(a, b, -product)


@triton.jit
def quotient(a, b, r):
    """a / b, where r is about 1 / b: what rounding and r are off by is computed and put back."""
    q = a * r
    return tl.fma(fma(-q, b, a), r, q)


@triton.jit
def exp_compensated(x, x_low):
    """e^(x + x_low) in fp32 within 3 ULP, for finite results."""
    t = x * LOG2E_HIGH
    # Less t - x log2(e), and not plus its negative, for which t or x would be negated: Triton does
    # that by a subtraction from 0.
    excess = fma(x, tl.full((), -LOG2E_HIGH, tl.float32), t)
    t_low = x * LOG2E_LOW - excess
    e = exp2_approx(t)
    return tl.fma(e, tl.fma(t_low, LN2, x_low), e)


@triton.jit
def clamp_max(x, maximum):
    return tl.minimum(x, maximum, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, minimum, maximum):
    return clamp_max(tl.maximum(x, minimum, propagate_nan=tl.PropagateNan.ALL), maximum)
