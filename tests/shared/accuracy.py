"""How accurate is accurate: inputs, and the one table of tolerances, in ULPs of the true value."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from tests.shared.ulp import all_finite, ulp_error


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Gates on the error.

    Args:
        low: 16-bit; a correctly rounded result is within 0.5 and the fp32 math adds little.
        low_near_root: 16-bit, within 0.03 of the derivative's zero.
        misrounded: 16-bit; the share of results that are not the nearest one.
        full: fp32 where the exponential gets >= -87, off the derivative's zero.
        absolute: fp32 around that zero.
        tail: fp32 below -87; torch itself is off by 1.7e7 there.
        added: by the bytes of x, what an element adds to the gradient of a weight. That is a sum in
            fp32, so this is in ULP of fp32, of which a 16-bit ULP has 2^13 or more.
    """

    low: float = 0.51
    low_near_root: float = 2.0
    misrounded: float = 0.0005
    full: float = 8.0
    absolute: float = 2**-22
    tail: float = 128.0
    added: dict[int, float] = dataclasses.field(default_factory=lambda: {2: 256.0, 4: 16.0})


FORWARD = Tolerance()
# A zero of the sum, s + z s (1 - s), costs bits around it.
DERIVATIVE = Tolerance(misrounded=0.002, full=16.0)
# With 2^x and 1 / x as far off as the hardware's may be, exact ties tip over: all that a Swish with
# a tiny beta makes of subnormal fp16, x / 2. None goes far.
PERTURBED = {
    "forward": Tolerance(misrounded=0.02),
    "derivative": Tolerance(misrounded=0.02, full=16.0),
}
# Torch ops have no fma to tell what rounding took from beta * x.
FORMULA_WITH_BETA = Tolerance(misrounded=0.002, full=128.0)
# They are too few for a share of them to say something.
SPECIALS = Tolerance(misrounded=1.0, full=16.0)
# Triton's interpreter truncates fp32 to bf16 instead of rounding it.
INTERPRETED_BF16 = Tolerance(low=1.02, misrounded=1.0)


def stratified_fp32(mantissas: int = 4096) -> Tensor:
    """Evenly spaced mantissas in every binade of both signs, subnormals included."""
    binades = torch.arange(255, dtype=torch.int64).unsqueeze(1) << 23
    steps = torch.arange(mantissas, dtype=torch.int64) * (2**23 // mantissas)
    magnitudes = (binades + steps).flatten()
    bits = torch.cat([magnitudes, magnitudes - 2**31])
    return bits.to(torch.int32).view(torch.float32)


def inputs(dtype: torch.dtype, case=None) -> Tensor:
    """All finite values of a 16-bit dtype; 2,088,960 values of fp32, 32,640 where weights are."""
    if dtype.itemsize == 2:
        return all_finite(dtype)
    return stratified_fp32(64 if case is not None and case.facts.weights else 4096)


def specials(dtype: torch.dtype) -> Tensor:
    """NaN, infinities, zeros, extremes, subnormals, and both neighbours of every kink or seam.

    Their number is odd, so that repeated they come by every lane of a vector.
    """
    info, nan, inf = torch.finfo(dtype), float("nan"), float("inf")
    bits_dtype = torch.int16 if dtype.itemsize == 2 else torch.int32
    # The kink of ReLU6, clamps, tails, the ends of polynomials and of the normal numbers.
    seams = torch.tensor(
        [6.0, 20.0, -87.0, 1.0, -1.0, 0.25, -0.125, 0.55, -0.8, info.tiny, -info.tiny], dtype=dtype
    )
    steps = torch.tensor([[-1], [0], [1]], dtype=bits_dtype)
    neighbours = (seams.view(bits_dtype) + steps).view(dtype).flatten()
    smallest = torch.tensor([1], dtype=bits_dtype).view(dtype)  # the neighbours of 0
    others = torch.tensor([nan, inf, -inf, 0.0, -0.0, info.max, info.min, -6.0], dtype=dtype)
    return torch.cat([others, smallest, -smallest, neighbours])


@dataclasses.dataclass
class Region:
    """The errors found where a kind of inputs lie, in ULP or absolute."""

    gate: float
    maximum: float = 0.0
    at: float = float("nan")
    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.count

    def add(self, x: Tensor, error: Tensor, where: Tensor) -> None:
        error = error[where]
        if error.numel() == 0:
            return
        self.count += error.numel()
        self.total += float(error.sum())
        worst = int(error.argmax())
        if float(error[worst]) >= self.maximum:
            self.maximum, self.at = float(error[worst]), float(x[where][worst])


class Errors:
    """The errors of `kind` ("forward" or "derivative") of `case`, gathered chunk by chunk."""

    def __init__(self, case, kind: str, dtype: torch.dtype, tolerance: Tolerance):
        self.case, self.kind, self.dtype, self.tolerance = case, kind, dtype, tolerance
        self.misrounded = 0
        if dtype is torch.float32:
            self.regions = {
                "x >= -87": Region(tolerance.full),
                "zero of f', absolute": Region(tolerance.absolute),
                "x < -87, normal": Region(tolerance.tail),
                "x < -87, subnormal": Region(tolerance.tail),
            }
        else:
            self.regions = {
                "off the zero of f'": Region(tolerance.low),
                "zero of f'": Region(tolerance.low_near_root),
            }

    def add(self, x: Tensor, result: Tensor, exact: Tensor) -> None:
        """Compare `result` with the `exact` values at finite `x`."""
        assert result.dtype is x.dtype is self.dtype
        assert not result.isnan().any(), f"{self.case}: NaN from {x[result.isnan()][0]}"
        facts = self.case.facts
        z = facts.exponent(x.double(), *self.case.parameters)
        ulps = ulp_error(result, exact, x.dtype)
        near = torch.zeros_like(z, dtype=torch.bool)
        if self.kind == "derivative" and facts.root is not None:
            width = 0.45 if self.dtype is torch.float32 else 0.03
            near = (z - facts.root).abs() < width
        if self.dtype is torch.float32:
            tail, normal = z < -87, exact.abs() >= torch.finfo(self.dtype).tiny
            absolute = (result.double() - exact).abs()
            errors = (ulps, absolute, ulps, ulps)
            where = (~tail & ~near, near, tail & normal, tail & ~normal)
        else:
            self.misrounded += int((result != exact.to(x.dtype)).sum())
            errors, where = (ulps, ulps), (~near, near)
        for region, error, inside in zip(self.regions.values(), errors, where):
            region.add(x, error, inside)

    def check(self) -> None:
        """Assert that no error passes its gate."""
        name = f"{self.case} {self.kind} {self.dtype}"
        for where, region in self.regions.items():
            assert region.maximum <= region.gate, (
                f"{name}, {where}: {region.maximum:.4g} > {region.gate} at {region.at!r}"
            )
        share = self.misrounded / max(1, sum(region.count for region in self.regions.values()))
        assert share <= self.tolerance.misrounded, f"{name}: {share:.4%} are not correctly rounded"


# Filled by `report`, printed by conftest.py behind the tests.
REPORT: dict[tuple[str, ...], tuple] = {}


def report(subject: str, errors: Errors) -> None:
    """Put fp32 errors into the table that ends the run: for each region its worst parameters."""
    for where, region in errors.regions.items():
        if errors.dtype is not torch.float32 or region.maximum == 0:
            continue
        key = (subject, errors.case.name, errors.kind, where)
        parameters = ", ".join(map(str, errors.case.parameters))
        add_to_report(key, (region.maximum, region.mean, region.at, parameters, region.count))


def add_to_report(key: tuple[str, ...], found: tuple) -> None:
    if key not in REPORT or found[0] >= REPORT[key][0]:
        REPORT[key] = found


def as_fp32(case) -> list[float]:
    """The parameters as torch takes scalars."""
    if case.row.family == "mirrored":  # it is a dimension
        return []
    return torch.tensor(case.parameters, dtype=torch.float32).double().tolist()


def true_value(case, kind: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """`kind` of `case` at `x` in float64.

    Where `y` is saved, the derivative is that of the rounded `y`: of the one given, or the nearest.
    """
    wide, parameters = x.detach().double(), as_fp32(case)
    if case.facts.weights:
        parameters = [torch.tensor(parameter).double() for parameter in parameters]
    if kind != "derivative" or case.facts.derivative is not None:
        return getattr(case.facts, kind)(wide, *parameters)
    if y is None:
        y = case.facts.forward(wide, *parameters).to(x.dtype)
    return case.facts.derivative_from_output(y.detach().double(), *parameters)


@functools.lru_cache(maxsize=8)
def true_values(case, kind: str, dtype: torch.dtype) -> Tensor:
    """`true_value` at all `inputs`; for several who compute the same."""
    return true_value(case, kind, spread(case, kind, inputs(dtype, case)))


def spread(case, kind: str, x: Tensor) -> Tensor:
    """What each element of a result of `x` is computed of: a mirrored output has two for one."""
    return torch.cat([x, -x]) if case.row.family == "mirrored" and kind == "forward" else x


def as_batch(case, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A vector with a weight for each element: x, the weights, a gradient.

    It is a batch of one, with a channel for each element, of two columns, so that rows have the
    weights. The gradient reaches the first column alone.
    """
    batch = x.detach().reshape(1, -1, 1).repeat(1, 1, 2)
    gradient = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device).expand_as(batch)
    return batch, torch.full((x.numel(),), *case.parameters, device=x.device), gradient.clone()


def evaluate(case, x: Tensor, kernels) -> dict[str, Tensor]:
    """The results of `case` for a vector `x`: "forward", "derivative", "weight_derivative".

    Derivatives are gradients for a gradient of 1. They are those of the selected backend; where
    there is a weight, those of its raw ops, `kernels`, whose weights are fp32.
    """
    if not case.facts.weights:
        x = x.detach().requires_grad_()
        y = case.function(x)
        (derivative,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return {"forward": y.detach().cpu(), "derivative": derivative.cpu()}
    batch, weight, gradient = as_batch(case, x)
    y = kernels.forward(batch, weight)
    derivative, added = kernels.backward(gradient, batch, weight)
    results = {"forward": y[0, :, 0], "derivative": derivative[0, :, 0], "weight_derivative": added}
    return {kind: result.cpu() for kind, result in results.items()}


def tolerance_of(kind: str) -> Tolerance:
    return FORWARD if kind == "forward" else DERIVATIVE


def check_all(
    case,
    x: Tensor,
    results: dict[str, Tensor],
    tolerances: dict[str, Tolerance] | None = None,
    subject: str | None = None,
    interpreted: bool = False,
    are_inputs: bool = False,
) -> None:
    """Assert that all `results` of `evaluate` are right at finite `x`.

    Args:
        tolerances: by kind, if not the usual ones.
        subject: whose errors are reported, if they are.
        interpreted: Triton's interpreter made them, which mangles bf16: see INTERPRETED_BF16.
        are_inputs: `x` are all `inputs`, so that true values that are known serve again.
    """
    x, y = x.detach().cpu(), results["forward"]
    mangled = interpreted and x.dtype is torch.bfloat16
    for kind, result in results.items():
        at = spread(case, kind, x)
        if are_inputs and (kind != "derivative" or case.facts.derivative is not None):
            exact = true_values(case, kind, x.dtype)
        else:
            exact = true_value(case, kind, at, y)
        tolerance = (tolerances or {}).get(kind)
        if mangled:  # subnormal numbers, too, coming and going
            tiny, tolerance = torch.finfo(x.dtype).tiny, INTERPRETED_BF16
            inside = ((at.abs() >= tiny) | (at == 0)) & ((exact.abs() >= tiny) | (exact == 0))
            at, result, exact = at[inside], result[inside], exact[inside]
        if kind == "weight_derivative":
            gate = FORWARD.added[x.itemsize] * (2 if tolerances else 1)
            assert not result.isnan().any()
            assert ulp_error(result, exact, torch.float32).max() <= gate
        else:
            check(case, kind, at, result, tolerance, subject, exact)


def check(
    case,
    kind: str,
    x: Tensor,
    result: Tensor,
    tolerance: Tolerance | None = None,
    subject: str | None = None,
    exact: Tensor | None = None,
    y: Tensor | None = None,
) -> Errors:
    """Assert that `result` is `kind` ("forward" or "derivative") of `case` at finite `x`.

    `y` is what forward has made of `x`, from which the derivative may come.
    Reports the errors, if there is a `subject` to report them of, and returns them.
    """
    x, result = x.detach().cpu(), result.detach().cpu()
    errors = Errors(case, kind, x.dtype, tolerance or tolerance_of(kind))
    y = None if y is None else y.detach().cpu()
    errors.add(x, result, true_value(case, kind, x, y) if exact is None else exact)
    if subject is not None:
        report(subject, errors)
    errors.check()
    return errors


def check_specials(case, x: Tensor, y: Tensor, derivative: Tensor) -> None:
    """Assert what is promised for NaN and infinities, and the usual accuracy elsewhere.

    The forward is torch's. The gradient is NaN where torch makes it NaN for NaN, or 1 through a
    mask; for a finite x it never is.
    """
    x, y, derivative = x.detach().cpu(), y.detach().cpu(), derivative.detach().cpu()
    finite = x.isfinite()
    expected = case.torch_function(x)
    torch.testing.assert_close(y[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    at_nan = derivative[x.isnan()]
    if case.row.saves == "mask":
        # torch's own ReLU6 gives 0 or 1 on a CPU, depending on the length.
        slope = torch.tensor(case.parameters or 1.0, dtype=torch.float32).to(x.dtype)
        torch.testing.assert_close(at_nan, slope.expand_as(at_nan))
    else:
        # Of a vector: torch's own SELU makes no NaN of a shorter tensor, nor on a GPU.
        leaf = torch.full((64,), float("nan"), dtype=x.dtype, requires_grad=True)
        (theirs,) = torch.autograd.grad(case.torch_function(leaf).sum(), leaf)
        assert (at_nan.isnan() == theirs.isnan()[0]).all()
    check(case, "forward", x[finite], y[finite], SPECIALS)
    check(case, "derivative", x[finite], derivative[finite], SPECIALS, y=y[finite])


def outputs(case, dtype: torch.dtype) -> Tensor:
    """Every finite output of `case` for `inputs`, correctly rounded."""
    y = true_value(case, "forward", inputs(dtype)).to(dtype)
    return y[y.isfinite()].unique()


def check_from_output(
    case, y: Tensor, derivative: Tensor, tolerance: Tolerance = DERIVATIVE
) -> None:
    """Assert that `derivative` is that of `case` where its output, rounded, is `y`."""
    exact = case.facts.derivative_from_output(y.double(), *as_fp32(case))
    check(case, "derivative", y, derivative, tolerance, exact=exact)


def assert_near(
    case,
    kind: str,
    result: Tensor,
    x: Tensor,
    factor: Tensor | float = 1.0,
    y: Tensor | None = None,
    inplace: bool = False,
) -> None:
    """Assert that `result` is `factor` times `kind` of `case` at `x`, near enough to tell bugs.

    For tests of layouts and sizes, whose x are random: `check` judges the accuracy. A derivative
    takes `y`, what forward has made of `x`: where `y` is saved, out of place or `inplace`, backward
    knows nothing else, and the last places of a `y` in fp32 may well be wrong.
    """
    factor = torch.as_tensor(factor, dtype=torch.float64)
    saves = case.row.saves_inplace if inplace else case.saves
    if kind == "derivative" and saves == "y":
        assert y is not None, f"{case} saves y: its derivative is that of y"
        exact = case.facts.derivative_from_output(y.detach().double(), *as_fp32(case))
    else:
        exact = true_value(case, kind, x)
    eps = torch.finfo(x.dtype).eps
    largest = max(1.0, factor.abs().max().item()) if factor.numel() > 0 else 1.0
    expected = (exact * factor).to(x.dtype)
    torch.testing.assert_close(result, expected, rtol=4 * eps, atol=4 * eps * largest)
