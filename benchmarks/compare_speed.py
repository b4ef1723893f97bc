"""How long the kernels take, next to everything a user could pick instead.

    python -m benchmarks.compare_speed [--sizes 2^14 2^27] [--dtypes bf16] [--quick]

The yardstick is a copy that moves the same bytes, timed next to each case: no kernel that has to
move these bytes is much faster. Every median comes as a share of it. Where that is over 100 %, the
call moved fewer bytes than the formula says: `torch.compile` saves a byte for ReLU6's gradient.

- GPU times are those between two events around the call, the L2 cache flushed before it. The host
  runs ahead during the flush, which hides its own time where that is the shorter of the two. Small
  tensors are slower than the copy because of what launching a kernel costs.
- Kernels and ATen run without autograd, as raw ops. What is compiled or naive runs forward as in
  training, and backward is `torch.autograd.grad` alone, through a graph that is kept.
- forward is that of training, in which our ReLU6 also writes its mask; inference writes none.
- Without a GPU no kernel runs: torch, compiled and naive are timed on one CPU thread, caches warm.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils import benchmark

from benchmarks import environment, providers
from benchmarks.providers import DEVICE, DTYPES, Provider
from fused_act.activation import Activation
from fused_act.activations import ACTIVATIONS
from fused_act.backends import Kernels

BYTES = """\
Bytes an element, of `s` bytes, that have to be moved:
  inference, forward   2 s     (read x, write y);  forward with a mask of bits   + 1/8
  backward             3 s     (read grad_output and x, write grad_input);  from a mask   2 s + 1/8
"""
LARGE = 2**28  # bytes of a tensor; several times what the largest L2 cache holds

Times = tuple[float, float, float]  # median, 20 % and 80 % quantile, in ms
QUANTILES = (0.5, 0.2, 0.8)


def gpu_timer(duration_ms: int) -> Callable[[Callable], Times]:
    from triton.testing import do_bench

    return lambda call: tuple(do_bench(call, rep=duration_ms, quantiles=list(QUANTILES)))


def cpu_timer(duration_ms: int) -> Callable[[Callable], Times]:
    # One thread, compiled code included: several wait for each other on a busy machine.
    torch.set_num_threads(1)

    def timer(call: Callable) -> Times:
        stopwatch = benchmark.Timer("call()", globals={"call": call})
        seconds = stopwatch.blocked_autorange(min_run_time=duration_ms / 1000).times
        quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
        return tuple(
            (1000 * torch.tensor(seconds, dtype=torch.float64).quantile(quantiles)).tolist()
        )

    return timer


def directions(activation: Activation) -> list[str]:
    """What is timed; inference is the same kernel as forward where no mask is written."""
    inference = ["inference"] if activation.saves_mask else []
    return [*inference, "forward", "backward", "forward+backward"]


def bytes_moved(direction: str, dtype: torch.dtype, numel: int, has_mask: bool) -> int:
    tensor = numel * dtype.itemsize
    mask = (numel + 7) // 8
    forward = 2 * tensor + (mask if has_mask else 0)
    backward = 2 * tensor + mask if has_mask else 3 * tensor
    return {
        "inference": 2 * tensor,
        "forward": forward,
        "backward": backward,
        "forward+backward": forward + backward,
    }[direction]


def copy_call(bytes_: int) -> Callable[[], Tensor]:
    """A copy that reads half of `bytes_` and writes the other half."""
    source = torch.randint(256, (bytes_ // 2,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def raw_call(
    kernels: Kernels, parameters: tuple[float, ...], direction: str, x: Tensor, grad_output: Tensor
) -> Callable[[], object]:
    """The ops behind one direction, below autograd."""
    if direction == "inference" or kernels.forward_with_mask is None:
        forward, saved, layout = kernels.forward, x, ()
    else:
        forward = kernels.forward_with_mask
        saved, layout = forward(x, *parameters)[1], (x.stride(),)
    if direction == "backward":
        return lambda: kernels.backward(grad_output, saved, *parameters, *layout)
    if direction == "forward+backward":
        return lambda: (
            forward(x, *parameters),
            kernels.backward(grad_output, saved, *parameters, *layout),
        )
    return lambda: forward(x, *parameters)


def public_call(
    function: Callable[[Tensor], Tensor], direction: str, x: Tensor, grad_output: Tensor
) -> Callable[[], object]:
    """One direction of `function` as a user runs it."""
    if direction == "inference":
        return lambda: function(x)
    x = x.detach().requires_grad_()
    if direction == "backward":
        y = function(x)
        return lambda: torch.autograd.grad(y, x, grad_output, retain_graph=True)
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(function(x), x, grad_output)
    return lambda: function(x)


def measure(
    provider: Provider,
    activation: Activation,
    x: Tensor,
    grad_output: Tensor,
    timer: Callable[[Callable], Times],
    copies: dict[int, float],
) -> Iterator[dict]:
    """One row for each direction of one provider.

    Args:
        copies: the median of a copy by its bytes; what is missing is measured and added.
    """
    function = provider.function(activation, False)
    if function is None:
        return
    function = provider.prepare(function)
    parameters = providers.parameters(activation)
    kernels = provider.kernels and provider.kernels(activation)
    has_mask = kernels is not None and kernels.forward_with_mask is not None
    for direction in directions(activation):
        bytes_ = bytes_moved(direction, x.dtype, x.numel(), has_mask)
        times, error = (), ""
        try:
            if bytes_ not in copies:
                copies[bytes_], *_ = timer(copy_call(bytes_))
            with_graph = kernels is None and direction != "inference"
            with provider.selected(), torch.set_grad_enabled(with_graph):
                if kernels is not None:
                    call = raw_call(kernels, parameters, direction, x, grad_output)
                else:
                    call = public_call(function, direction, x, grad_output)
                times = timer(call)
        except Exception as caught:
            error = providers.error_text(caught)
        yield {
            "provider": provider.name,
            "activation": activation.name,
            "dtype": providers.dtype_name(x.dtype),
            "direction": direction,
            "numel": x.numel(),
            **dict(zip(("median_ms", "q20_ms", "q80_ms"), times or ("", "", ""))),
            "bytes": bytes_,
            "gbps": bytes_ / times[0] / 1e6 if times else "",
            "share_of_copy": copies[bytes_] / times[0] if times else "",
            "error": error,
        }


def size(text: str) -> int:
    """A number of elements: `1048576` or `2^20`."""
    base, _, exponent = text.partition("^")
    return int(base) ** int(exponent or 1)


def size_name(numel: int) -> str:
    exponent = numel.bit_length() - 1
    return f"2^{exponent}" if numel == 2**exponent else str(numel)


def cases(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """The pairs of dtype and size to measure.

    By default the first dtype stands for all at small sizes, where the launch is what counts.
    """
    on_gpu = DEVICE.type == "cuda"
    dtypes = arguments.dtypes or (["bf16"] if arguments.quick else list(DTYPES))
    if arguments.sizes:
        return [(dtype, numel) for dtype in dtypes for numel in arguments.sizes]
    if not on_gpu:
        return [(dtype, 2**20) for dtype in dtypes]
    small = [] if arguments.quick else [(dtypes[0], 2**14), (dtypes[0], 2**20)]
    return [*small, *((dtype, LARGE // DTYPES[dtype].itemsize) for dtype in dtypes)]


def case_of(row: dict) -> tuple:
    return row["activation"], row["direction"], row["dtype"], row["numel"]


def by_case(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """The rows by what was computed, then by who computed it."""
    found = {}
    for row in rows:
        found.setdefault(case_of(row), {})[row["provider"]] = row
    return found


def case_name(case: tuple) -> str:
    activation, direction, dtype, numel = case
    return f"{activation} {direction} {dtype} {size_name(numel)}"


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["error"]:
        return "failed"
    return f"{row['median_ms']:.4f} {row['share_of_copy']:5.0%}"


def print_results(rows: list[dict], names: list[str]) -> None:
    print("\nMedian in ms and share of a copy of the same bytes (100 % is the yardstick)\n")
    lines = [
        (case_name(case), *(cell(found.get(name)) for name in names))
        for case, found in by_case(rows).items()
    ]
    print(environment.table(["", *names], lines))
    providers.print_errors(rows)


def print_losses(rows: list[dict]) -> None:
    """Every case in which the best of ours is slower than the best alternative."""
    ours = {provider.name for provider in providers.PROVIDERS if provider.is_ours}
    losses, compared = [], 0
    for case, found in by_case(rows).items():
        valid = [row for row in found.values() if not row["error"]]
        own = [row for row in valid if row["provider"] in ours]
        alternatives = [row for row in valid if row["provider"] not in ours]
        if not own or not alternatives:
            continue
        compared += 1
        best, other = (
            min(group, key=lambda row: row["median_ms"]) for group in (own, alternatives)
        )
        ratio = other["median_ms"] / best["median_ms"]
        if ratio < 1:
            losses.append(
                f"  {ratio:.3f}x  {case_name(case)}: "
                f"{best['provider']} {best['median_ms']:.4f} ms, "
                f"{other['provider']} {other['median_ms']:.4f} ms"
            )
    print(f"\nThe best of ours is slower than the best alternative in {len(losses)} of {compared}:")
    print("\n".join(losses) or "  none")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    environment.add_results_argument(parser)
    parser.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        metavar="N",
        help="numbers of elements, as 1048576 or 2^20, each for every dtype; by default 2^28 bytes "
        "for every dtype, and 2^14 and 2^20 elements for the first; on a CPU 2^20 elements",
    )
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", help="default: all")
    parser.add_argument(
        "--quick", action="store_true", help="bf16 at one size, and fewer repetitions"
    )
    return parser.parse_args()


def measure_all(
    pairs: list[tuple[str, int]], compared: list[Provider], timer: Callable[[Callable], Times]
) -> Iterator[dict]:
    for activation, (dtype, numel) in itertools.product(ACTIVATIONS, pairs):
        print(f"{activation.name} {dtype} {size_name(numel)}", file=sys.stderr)
        x = torch.randn(numel, dtype=DTYPES[dtype], device=DEVICE)
        grad_output = torch.randn_like(x)
        copies = {}
        for provider in compared:
            yield from measure(provider, activation, x, grad_output, timer, copies)


def main() -> None:
    arguments = parse_arguments()
    environment.print_environment()
    on_gpu = DEVICE.type == "cuda"
    compared = providers.available()
    if not on_gpu:
        compared = [provider for provider in compared if provider.backend == "auto"]
        print("NO GPU: no kernel ran. These are times of torch on one CPU thread, caches warm.")
    print(BYTES)
    timer = (gpu_timer if on_gpu else cpu_timer)(20 if arguments.quick else 50)
    torch.manual_seed(0)
    rows = []
    try:
        # Graphs are kept, which compiled code that reuses its saved buffers would not allow.
        with torch._functorch.config.patch(donated_buffer=False):
            for row in measure_all(cases(arguments), compared, timer):
                rows.append(row)
    finally:
        # A kernel that faults ends all use of the GPU, but not what was measured before.
        environment.write_csv(arguments.results / "speed.csv", rows)
    print_results(rows, [provider.name for provider in compared])
    print_losses(rows)


if __name__ == "__main__":
    main()
