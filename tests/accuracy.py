"""How accurate is accurate: inputs, and the one table of tolerances, in ULPs of the true value."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks import oracle

# Where the derivative of mish and of swish crosses 0, in beta * x. There an error in ULPs of a
# value near 0 says nothing.
ROOTS = {"mish": -1.1924337, "swish": -1.2784645}


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Gates on the error.

    Args:
        low: 16-bit; a correctly rounded result is within 0.5 and the fp32 math adds little.
        low_near_root: 16-bit, within 0.03 of the derivative's zero.
        misrounded: 16-bit; the share of results that are not the nearest one.
        full: fp32 where beta * x >= -87, off the derivative's zero.
        absolute: fp32 around that zero.
        tail: fp32 below -87; torch itself is off by 1.7e7 there.
    """

    low: float = 0.51
    low_near_root: float = 2.0
    misrounded: float = 0.0005
    full: float = 8.0
    absolute: float = 2**-22
    tail: float = 128.0


FORWARD = Tolerance()
# A zero of the sum, s + z s (1 - s), costs bits around it.
DERIVATIVE = Tolerance(misrounded=0.002, full=16.0)
# With 2^x and 1 / x as far off as the hardware's may be; more results tip over, none goes far.
PERTURBED_FORWARD = Tolerance(misrounded=0.002)
# Triton's interpreter truncates fp32 to bf16 instead of rounding it.
INTERPRETED_BF16 = Tolerance(low=1.02, misrounded=1.0)


def all_finite(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit dtype: 63,488 of fp16, 65,280 of bf16."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def stratified_fp32(mantissas: int = 4096) -> Tensor:
    """Evenly spaced mantissas in every binade of both signs, subnormals included."""
    binades = torch.arange(255, dtype=torch.int64).unsqueeze(1) << 23
    steps = torch.arange(mantissas, dtype=torch.int64) * (2**23 // mantissas)
    magnitudes = (binades + steps).flatten()
    bits = torch.cat([magnitudes, magnitudes - 2**31])
    return bits.to(torch.int32).view(torch.float32)


def worst(error: Tensor, x: Tensor, where: Tensor) -> tuple[float, float]:
    """The largest error in a region and the input that has it."""
    error = torch.where(where, error, -1.0)
    index = int(error.argmax())
    return float(error[index]), float(x[index])


def true_value(case, kind: str, x: Tensor) -> Tensor:
    """`kind` of `case` at `x` in float64. Parameters count as fp32, as torch takes scalars."""
    parameters = torch.tensor(case.parameters, dtype=torch.float32).double().tolist()
    return getattr(oracle, kind)(case.name, x.detach().double(), *parameters)


def check(
    case, kind: str, x: Tensor, result: Tensor, tolerance: Tolerance | None = None
) -> dict[str, tuple[float, float]]:
    """Assert that `result` is `kind` ("forward" or "derivative") of `case` at `x`.

    Returns the worst error and its input by region.
    """
    if tolerance is None:
        tolerance = FORWARD if kind == "forward" else DERIVATIVE
    x, result = x.detach().cpu(), result.detach().cpu()
    assert result.dtype is x.dtype
    exact = true_value(case, kind, x)
    assert not result.isnan().any(), f"NaN from {x[result.isnan()][0]}"
    z = x.double() * (case.parameters[0] if case.parameters else 1.0)
    distance = (z - ROOTS.get(case.name, float("inf"))).abs()
    ulps = oracle.ulp_error(result, exact, x.dtype)
    if x.dtype is torch.float32:
        near = (distance < 0.45) if kind == "derivative" else torch.zeros_like(distance, dtype=bool)
        gates = {
            "bulk": (ulps, (z >= -87) & ~near, tolerance.full),
            "tail": (ulps, z < -87, tolerance.tail),
            "root": ((result.double() - exact).abs(), near, tolerance.absolute),
        }
    else:
        near = (distance < 0.03) if kind == "derivative" else torch.zeros_like(distance, dtype=bool)
        misrounded = float((result != exact.to(x.dtype)).double().mean())
        assert misrounded <= tolerance.misrounded, f"{misrounded:.4%} are not correctly rounded"
        gates = {
            "bulk": (ulps, ~near, tolerance.low),
            "root": (ulps, near, tolerance.low_near_root),
        }
    found = {}
    for region, (error, where, gate) in gates.items():
        found[region] = worst(error, x, where)
        error, at = found[region]
        assert error <= gate, f"{case} {kind} {x.dtype} {region}: {error:.4g} > {gate} at {at!r}"
    return found


def check_interpreted_bf16(case, x: Tensor, y: Tensor, derivative: Tensor) -> None:
    """`check` for Triton's interpreter, which also mangles subnormal bf16, coming and going.

    What it hides, the same formulas show on the host: see test_host_kernels.py.
    """
    tiny = torch.finfo(torch.bfloat16).tiny
    for kind, result in (("forward", y), ("derivative", derivative)):
        normal = (x.abs() >= tiny) | (x == 0)
        exact = true_value(case, kind, x)
        normal &= (exact.abs() >= tiny) | (exact == 0)
        check(case, kind, x[normal], result[normal], INTERPRETED_BF16)


def assert_near(case, kind: str, result: Tensor, x: Tensor, factor: Tensor | float = 1.0) -> None:
    """Assert that `result` is `factor` times `kind` of `case` at `x`, near enough to tell bugs.

    For tests of layouts and sizes, whose x are random: `check` judges the accuracy.
    """
    exact = true_value(case, kind, x) * (factor.double() if torch.is_tensor(factor) else factor)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(result, exact.to(x.dtype), rtol=4 * eps, atol=4 * eps)
