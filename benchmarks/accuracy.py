"""How far results are from the true value, next to everything a user could pick instead.

    python -m benchmarks accuracy [--dtypes fp16 bf16 fp32] [--mantissas 2^15]

The unit is the last place that the true value has in the dtype (ULP), or the dtype's smallest step
where the true value is less than normal. The nearest result is off by half a unit at most; what is
off by more counts as not correctly rounded. A NaN from a finite input is off by infinity. The true
values are float64; see tests/shared/facts.py.

- fp16, bf16: all finite inputs. fp32: as many mantissas of every binade and sign, one drawn from
  each of equal steps, so that the mean is that of all finite inputs and the maximum is of a sample
  of 2^24. With --mantissas 2^23 it is of all there are, which takes a GPU minutes.
- The negative tail counts by itself: what torch loses there would swamp the rest. So does the
  neighbourhood of a derivative's zero, where the absolute error is what says something.
- Derivatives are gradients for a grad_output of 1. At its kinks, 0 and 6, the derivative of ReLU6
  counts as 0, which is what torch makes it; so does that of CReLU at 0. CReLU is judged in both
  halves of its output, the second of which is the forward of -x, and in one derivative of both.
- PReLU and the learnable Swish have the weight that their modules begin with, 0.25 and 1, in the
  dtype of x. weight_derivative is the gradient of the weight. Each input has a weight of its own,
  so none of these gradients is a sum.
- Triton's interpreter stands in for a GPU where there is none. It takes exact functions for the
  approximate instructions; it truncates to bf16 instead of rounding, and garbles its subnormals.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import environment, options, providers
from benchmarks.providers import DEVICE, DTYPES, Provider
from fused_act.backends.triton import INTERPRET
from fused_act.families.base import Row
from tests.shared import ulp
from tests.shared.facts import FACTS, Facts

ROOT = (-1.7, -0.8)  # the derivatives of mish and of swish have their zeros in the middle
TAIL = -87.0  # below, e^x is less than the normal numbers of fp32 and bf16
PART = 2**22  # inputs that are judged at once


def stratified_fp32(mantissas: int) -> Iterator[Tensor]:
    """`mantissas` values of every binade and sign: a power of 2, then one from each equal step.

    They come in parts of one length, since compiled code has static shapes.
    """
    step = 2**23 // mantissas
    binades = torch.tensor([*range(255), *range(256, 511)]) << 23  # with the sign bit as the ninth
    together = max(n for n in range(1, 511) if 510 % n == 0 and (n == 1 or n * mantissas <= PART))
    for part in binades.split(together):
        within = torch.randint(step, (together, mantissas))
        within[:, 0] = 0
        bits = (part.unsqueeze(1) + torch.arange(mantissas) * step + within).flatten()
        yield bits.to(torch.int32).view(torch.float32)


def inputs(dtype: torch.dtype, mantissas: int) -> Iterator[Tensor]:
    if dtype.itemsize == 2:
        yield ulp.all_finite(dtype)
    else:
        yield from stratified_fp32(mantissas)


def evaluate(
    provider: Provider, activation: Row, function: Callable[..., Tensor], x: Tensor
) -> dict[str, Tensor]:
    """The forward of a vector `x`, and the gradients for a grad_output of 1, by kind.

    With a weight for each element `x` is a batch of one, with as many channels. So it is for a
    mirrored activation, whose forward is that of `x` and then that of `-x`.
    """
    batch = x if activation.family == "elementwise" else x.unsqueeze(0)
    options = {"dtype": x.dtype, "device": x.device}
    weights = providers.weights(activation, x.numel(), **options)
    leaves = [each.detach().requires_grad_() for each in (batch, *weights)]
    with provider.selected():
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    results = {"forward": y.detach(), **dict(zip(("derivative", "weight_derivative"), gradients))}
    return {kind: result.flatten() for kind, result in results.items()}


def true_values(activation: Row, kind: str, x: Tensor, y: Tensor) -> Tensor:
    """What `evaluate` should give, in float64, of the inputs that are `inputs_of` this kind.

    Args:
        y: the forward of who is judged: of one that saves it, the derivative is that of this.
    """
    facts, wide = FACTS[activation.name], x.double()
    options = {"dtype": torch.float64, "device": x.device}
    if activation.family == "elementwise":
        # fp32, which is what kernels and torch take parameters for.
        arguments = torch.tensor(providers.parameters(activation)).double().tolist()
    else:  # the parameter of a mirrored one is a dimension
        arguments = providers.weights(activation, **options)
    if of_output(activation, kind):
        return facts.derivative_from_output(y.double(), *arguments)
    return getattr(facts, kind)(wide, *arguments)


def of_output(activation: Row, kind: str) -> bool:
    """Whether the true value depends on the output that was saved, so that each has its own."""
    return kind == "derivative" and activation.Function.saves == "y"


def inputs_of(activation: Row, kind: str, x: Tensor) -> Tensor:
    """What each element of a result of `x` is computed of: a mirrored output has two for one."""
    return torch.cat([x, -x]) if activation.family == "mirrored" and kind == "forward" else x


def regions(facts: Facts, kind: str, x: Tensor, exact: Tensor) -> dict[str, Tensor]:
    """Where `x` is in each region, by name; regions without an input are left out."""
    tail = x < TAIL
    normal = exact.abs() >= torch.finfo(x.dtype).tiny
    near_root = torch.zeros_like(tail)
    if kind == "derivative" and facts.root is not None:
        near_root = (x > ROOT[0]) & (x < ROOT[1])
    found = {
        f"x >= {TAIL:g}": ~tail & ~near_root,
        "around the zero": near_root,
        f"x < {TAIL:g}, normal result": tail & normal,
        f"x < {TAIL:g}, less than normal": tail & ~normal,
    }
    return {name: where for name, where in found.items() if where.any()}


@dataclasses.dataclass
class Errors:
    """The errors of a provider in one region, over all parts of the inputs."""

    inputs: int = 0
    max_ulp: float = -1.0
    worst_input: float = math.nan
    sum_ulp: float = 0.0
    not_correctly_rounded: int = 0
    max_absolute: float = 0.0

    def add(self, result: Tensor, exact: Tensor, x: Tensor) -> None:
        error = ulp.ulp_error(result, exact, result.dtype).nan_to_num(nan=float("inf"))
        worst = int(error.argmax())
        if float(error[worst]) > self.max_ulp:
            self.max_ulp, self.worst_input = float(error[worst]), float(x[worst])
        self.inputs += x.numel()
        self.sum_ulp += float(error.sum())
        self.not_correctly_rounded += int((error > 0.5).sum())
        absolute = (result.double() - exact).abs().nan_to_num(nan=float("inf"))
        self.max_absolute = max(self.max_absolute, float(absolute.max()))

    def row(self) -> dict:
        found = dataclasses.asdict(self)
        found["mean_ulp"] = found.pop("sum_ulp") / self.inputs
        return found


def measure(
    compared: list[Provider], activation: Row, dtype: str, mantissas: int
) -> Iterator[dict]:
    """One row for each provider, kind and region."""
    facts = FACTS[activation.name]
    torch.compiler.reset()
    torch.manual_seed(0)
    functions = {
        provider: provider.compile(function)
        for provider in compared
        if (function := provider.function(activation, False)) is not None
    }
    found = {provider: collections.defaultdict(Errors) for provider in functions}
    errors = {}
    for part in inputs(DTYPES[dtype], mantissas):
        x = part.to(DEVICE)
        exact = {}
        for provider, function in functions.items():
            if provider in errors:
                continue
            try:
                results = evaluate(provider, activation, function, x)
            except Exception as error:
                errors[provider] = providers.error_text(error)
                continue
            for kind, result in results.items():
                at = inputs_of(activation, kind, x)
                if kind not in exact or of_output(activation, kind):
                    exact[kind] = true_values(activation, kind, at, results["forward"])
                for region, inside in regions(facts, kind, at, exact[kind]).items():
                    found[provider][kind, region].add(
                        result[inside], exact[kind][inside], at[inside]
                    )
    for provider in functions:
        row = {"provider": provider.name, "activation": activation.name, "dtype": dtype}
        if provider in errors:
            yield row | {"error": errors[provider]}
            continue
        for (kind, region), judged in found[provider].items():
            yield row | {"kind": kind, "region": region} | judged.row() | {"error": ""}


def print_results(rows: list[dict]) -> None:
    print("\nErrors in ULP: the largest, the input that has it, the mean of all inputs\n")
    header = ("", "provider", "max", "at x =", "mean", "not nearest", "inputs", "max absolute")
    cases, lines, exact = {}, [], []
    for row in rows:
        if not row["error"]:
            kind = row["kind"].replace("_", " ")
            case = f"{row['activation']} {kind} {row['dtype']}, {row['region']}"
            cases.setdefault(case, []).append(row)
    for case, found in cases.items():
        if not any(row["not_correctly_rounded"] for row in found):
            exact.append(case)
            continue
        for row in found:
            figures = (
                f"{row['max_ulp']:.4g}",
                f"{row['worst_input']:.6g}",
                f"{row['mean_ulp']:.3g}",
                str(row["not_correctly_rounded"]),
                str(row["inputs"]),
                f"{row['max_absolute']:.2g}",
            )
            lines.append((case if row is found[0] else "", row["provider"], *figures))
    print(environment.table(header, lines))
    print("\nCorrectly rounded by all:", *exact, sep="\n  ")
    providers.print_errors(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)
    options.add_dtypes(parser, list(DTYPES))
    parser.add_argument(
        "--mantissas",
        type=power_of_2,
        metavar="N",
        default=64 if INTERPRET else 2**15,
        help="fp32 inputs in each binade of each sign, of which there are 510; a power of 2 from "
        "2^8 to 2^23; default: 2^15, and 2^6 in Triton's interpreter, which is slow",
    )
    options.add_activations(parser)


def power_of_2(text: str) -> int:
    """A size that divides the 2^23 mantissas of a binade."""
    number = options.size(text)
    if number > 2**23 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"expected a power of 2 up to 2^23, got {text!r}")
    return number


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    compared = providers.available()
    if DEVICE.type == "cpu":
        print("NO GPU: these are the errors of torch's CPU code and of what else runs here.")
    cases = list(itertools.product(arguments.dtypes, dict.fromkeys(arguments.activations)))
    rows = environment.write_csv(
        arguments.results / "accuracy.csv",
        (
            row
            for dtype, activation in environment.progress(cases, len(cases))
            for row in measure(compared, activation, dtype, arguments.mantissas)
        ),
    )
    print_results(rows)
    return rows
