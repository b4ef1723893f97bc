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
from fused_act.backends import DTYPES
from tests import accuracy
from tests.cases import CASES, DEVICE, random


def run(case, dtype: torch.dtype, size: int, offset: int) -> None:
    """Forward and backward, in place too, on `size` elements behind `offset` others."""
    inputs, weights = (random(size + offset).to(dtype) for _ in range(2))
    x, weight = inputs.to(DEVICE)[offset:].requires_grad_(), weights.to(DEVICE)[offset:]
    inputs, weights = inputs[offset:], weights[offset:]
    for y in (case.function(x), case.function(x.clone(), inplace=True)):
        (grad,) = torch.autograd.grad(y, x, weight)
        accuracy.assert_near(case, "forward", y.detach().cpu(), inputs)
        accuracy.assert_near(case, "derivative", grad.cpu(), inputs, weights)


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
    print(f"sanitize: {count} tensors through {' and '.join(options.backends)}")


if __name__ == "__main__":
    main()
