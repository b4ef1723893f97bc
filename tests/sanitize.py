"""Runs every kernel on small and odd tensors, for compute-sanitizer to watch: `make sanitize`.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.sanitize

Without torch's caching allocator each tensor is an allocation of its own, so that memcheck sees
every access outside it. Little but our kernels runs on the GPU: the rest is done on the CPU.
"""

from __future__ import annotations

import argparse
import itertools

import torch

import fused_act
from fused_act.dispatch import DTYPES
from tests.shared import accuracy
from tests.shared.cases import ALL_CASES, CASES, DEVICE
from tests.shared.layouts import random

MATRICES = [case for case in ALL_CASES if case not in CASES]


def run(case, dtype: torch.dtype, size: int, offset: int) -> None:
    """Forward and backward, in place too, on `size` elements behind `offset` others."""
    inputs, weights = (random(size + offset).to(dtype) for _ in range(2))
    x, weight = inputs.to(DEVICE)[offset:].requires_grad_(), weights.to(DEVICE)[offset:]
    inputs, weights = inputs[offset:], weights[offset:]
    for y in (case.function(x), case.function(x.clone(), inplace=True)):
        (grad,) = torch.autograd.grad(y, x, weight)
        accuracy.assert_near(case, "forward", y.detach().cpu(), inputs)
        accuracy.assert_near(case, "derivative", grad.cpu(), inputs, weights)


def run_matrices(dtype: torch.dtype, columns: int, offset: int) -> None:
    """Of five channels side by side, and one behind the other: what is mirrored or has weights."""
    for shape in ((2, 5, columns), (2, columns, 5)):
        numel = 10 * columns
        inputs = random(numel + offset).to(dtype)
        x = inputs.to(DEVICE)[offset:].view(shape)
        x = (x if shape[1] == 5 else x.transpose(1, 2)).requires_grad_()
        weight = torch.linspace(-1, 1, 5).to(dtype).to(DEVICE).requires_grad_()
        for case in MATRICES:
            leaves = [x, weight] if case.facts.weights else [x]
            y = case.facts.function(*leaves)
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
            on_cpu = [leaf.detach().cpu().requires_grad_() for leaf in leaves]
            expected = case.facts.torch_function(*on_cpu)
            theirs = torch.autograd.grad(expected, on_cpu, torch.ones_like(expected))
            for ours, reference in zip((y, *grads), (expected, *theirs)):
                torch.testing.assert_close(ours.detach().cpu(), reference, rtol=0.02, atol=0.5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[*range(71), 4097, 8193])
    parser.add_argument("--offsets", type=int, nargs="+", default=list(range(8)))
    options = parser.parse_args(arguments)
    count = 0
    for backend in options.backends:
        with fused_act.use_backend(backend):
            for case, dtype, size, offset in itertools.product(
                CASES, DTYPES, options.sizes, options.offsets
            ):
                run(case, dtype, size, offset)
                count += 1
            for dtype, size, offset in itertools.product(DTYPES, options.sizes, options.offsets):
                run_matrices(dtype, size, offset)
                count += 2 * len(MATRICES)
    print(f"sanitize: {count} tensors through {' and '.join(options.backends)}")


if __name__ == "__main__":
    main()
