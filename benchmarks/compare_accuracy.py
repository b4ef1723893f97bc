"""How far results are from the true value, next to everything a user could pick instead.

    python -m benchmarks.compare_accuracy [--dtypes fp16 bf16 fp32] [--mantissas 8192]

The unit is the last place that the true value has in the dtype (ULP), or the dtype's smallest step
where the true value is less than normal. The nearest result is off by half a unit at most; what is
off by more counts as not correctly rounded. A NaN from a finite input is off by infinity. The true
values are float64; see benchmarks/oracle.py.

- fp16, bf16: all finite inputs. fp32: as many mantissas of every binade and sign, one drawn from
  each of equal steps, so that the mean is that of all finite inputs and the maximum is of a sample.
- The negative tail counts by itself: what torch loses there would swamp the rest. So does the
  neighbourhood of a derivative's zero, where the absolute error is what says something.
- Derivatives are gradients for a grad_output of 1. At its kinks, 0 and 6, the derivative of ReLU6
  counts as 0, which is what torch makes it.
- Triton's interpreter stands in for a GPU where there is none. It takes exact functions for the
  approximate instructions; it truncates to bf16 instead of rounding, and garbles its subnormals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import environment, oracle, providers
from benchmarks.providers import DEVICE, DTYPES, Provider
from fused_act.activation import Activation
from fused_act.activations import ACTIVATIONS
from fused_act.backends.triton import INTERPRET

KINDS = ("forward", "derivative")
ROOT = (-1.7, -0.8)  # the derivatives of mish and of swish have their zeros in the middle
TAIL = -87.0  # below, e^x is less than the normal numbers of fp32 and bf16


def stratified_fp32(mantissas: int) -> Tensor:
    """`mantissas` values of every binade and sign: a power of 2, then one from each equal step."""
    step = 2**23 // mantissas
    within = torch.randint(step, (255, mantissas), dtype=torch.int64)
    within[:, 0] = 0
    binades = torch.arange(255, dtype=torch.int64).unsqueeze(1) << 23
    magnitudes = (binades + torch.arange(mantissas) * step + within).flatten()
    bits = torch.cat([magnitudes, magnitudes - 2**31])
    return bits.to(torch.int32).view(torch.float32)


def value_and_derivative(
    provider: Provider, function: Callable[[Tensor], Tensor], x: Tensor
) -> dict[str, Tensor]:
    x = x.detach().to(DEVICE).requires_grad_()
    with provider.selected():
        y = provider.prepare(function)(x)
        (derivative,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return {"forward": y.detach().cpu(), "derivative": derivative.cpu()}


def regions(kind: str, x: Tensor, exact: Tensor) -> dict[str, Tensor]:
    """Where `x` is in each region, by name; regions without an input are left out."""
    tail = x < TAIL
    normal = exact.abs() >= torch.finfo(x.dtype).tiny
    near_root = (x > ROOT[0]) & (x < ROOT[1])
    if kind == "forward" or not (exact[near_root] < 0).any():
        near_root = torch.zeros_like(tail)
    found = {
        f"x >= {TAIL:g}": ~tail & ~near_root,
        "around the zero": near_root,
        f"x < {TAIL:g}, normal result": tail & normal,
        f"x < {TAIL:g}, less than normal": tail & ~normal,
    }
    return {name: where for name, where in found.items() if where.any()}


def statistics(result: Tensor, exact: Tensor, x: Tensor, where: Tensor) -> dict:
    """The errors of `result` in one region."""
    result, exact, x = result[where], exact[where], x[where]
    error = oracle.ulp_error(result, exact, result.dtype).nan_to_num(nan=float("inf"))
    worst = int(error.argmax())
    return {
        "inputs": x.numel(),
        "max_ulp": float(error[worst]),
        "worst_input": float(x[worst]),
        "mean_ulp": float(error.mean()),
        "not_correctly_rounded": int((error > 0.5).sum()),
        "max_absolute": float((result.double() - exact).abs().max()),
    }


def measure(
    compared: list[Provider], activation: Activation, dtype: str, x: Tensor
) -> Iterator[dict]:
    """One row for each provider, kind and region."""
    # fp32, which is what kernels and torch take parameters for.
    parameters = torch.tensor(providers.parameters(activation)).double().tolist()
    exact = {
        kind: getattr(oracle, kind)(activation.name, x.double(), *parameters) for kind in KINDS
    }
    for provider in compared:
        function = provider.function(activation, False)
        if function is None:
            continue
        row = {"provider": provider.name, "activation": activation.name, "dtype": dtype}
        try:
            results = value_and_derivative(provider, function, x)
            for kind in KINDS:
                for region, where in regions(kind, x, exact[kind]).items():
                    found = statistics(results[kind], exact[kind], x, where)
                    yield row | {"kind": kind, "region": region} | found | {"error": ""}
        except Exception as error:
            yield row | {"error": providers.error_text(error)}


def print_results(rows: list[dict]) -> None:
    print("\nErrors in ULP: the largest, the input that has it, the mean of all inputs\n")
    header = ("", "provider", "max", "at x =", "mean", "not nearest", "inputs", "max absolute")
    cases, lines, exact = {}, [], []
    for row in rows:
        if not row["error"]:
            case = f"{row['activation']} {row['kind']} {row['dtype']}, {row['region']}"
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    environment.add_results_argument(parser)
    parser.add_argument(
        "--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES), help="default: all"
    )
    parser.add_argument(
        "--mantissas",
        type=int,
        metavar="N",
        default=64 if INTERPRET else 8192,
        help="fp32 inputs in each binade of each sign, of which there are 510; default: 8192, and "
        "64 in Triton's interpreter, which is slow",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    environment.print_environment()
    compared = providers.available()
    if DEVICE.type == "cpu":
        print("NO GPU: these are the errors of torch's CPU code and of what else runs here.")
    torch.manual_seed(0)
    rows = []
    for dtype in arguments.dtypes:
        low = DTYPES[dtype].itemsize == 2
        x = oracle.all_finite(DTYPES[dtype]) if low else stratified_fp32(arguments.mantissas)
        for activation in ACTIVATIONS:
            print(f"{activation.name} {dtype}", file=sys.stderr)
            rows += measure(compared, activation, dtype, x)
    environment.write_csv(arguments.results / "accuracy.csv", rows)
    print_results(rows)


if __name__ == "__main__":
    main()
