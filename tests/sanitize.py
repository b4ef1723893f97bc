"""Runs every kernel on small and odd tensors, for compute-sanitizer to watch: `make sanitize`.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.sanitize

Without torch's caching allocator each tensor is an allocation of its own, so that memcheck sees
every access outside it. Little but our kernels runs on the GPU: the rest is done on the CPU.
Without --sizes and --offsets they are those around the ends of vectors, mask bytes and tiles, each
at aligned and at misaligned addresses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

import fused_act
from fused_act.dispatch import DTYPES
from tests.shared import accuracy
from tests.shared.cases import ALL_CASES, CASES, DEVICE
from tests.shared.layouts import random

MATRICES = [case for case in ALL_CASES if case not in CASES]
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# Of both backends, in bytes: an access of a thread, an elementwise tile, and the columns of a tile
# that have weights of their own.
VECTOR, TILE, COLUMNS = 16, 4096, 128


def sizes_and_offsets(dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """The edges: ends of a vector, of a mask byte and of a tile, and three tiles with a tail.

    A tail is done element by element, wherever it begins. Full tiles use vector accesses: each
    alignment has a kernel of its own, and one of the offsets selects it.
    """
    vector, tile = VECTOR // dtype.itemsize, TILE // dtype.itemsize
    for size in sorted({0, 1, vector - 1, vector, vector + 1, 7, 8, 9, tile - 1}):
        yield from ((size, offset) for offset in (0, 1))
    for size in (tile, tile + 1, 2 * tile + 9):
        yield from ((size, offset) for offset in (0, 1, 2, 4) if offset < vector)


def columns_and_offsets(dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Likewise of a matrix: rows that end with a vector and that do not, short ones and long."""
    vector, tile = VECTOR // dtype.itemsize, TILE // dtype.itemsize
    for columns in (0, 1, vector - 1, vector, 9, tile, tile + 1):
        yield from ((columns, offset) for offset in (0, 1))


def run(case, dtype: torch.dtype, size: int, offset: int) -> None:
    """Forward and backward, in place too, on `size` elements behind `offset` others."""
    inputs, weights = (random(size + offset).to(dtype) for _ in range(2))
    x, weight = inputs.to(DEVICE)[offset:].requires_grad_(), weights.to(DEVICE)[offset:]
    inputs, weights = inputs[offset:], weights[offset:]
    for inplace in (False, True):
        y = case.function(x.clone() if inplace else x, inplace=inplace)
        (grad,) = torch.autograd.grad(y, x, weight)
        y = y.detach().cpu()
        accuracy.assert_near(case, "forward", y, inputs)
        accuracy.assert_near(case, "derivative", grad.cpu(), inputs, weights, y=y, inplace=inplace)


def run_matrices(cases, dtype: torch.dtype, columns: int, offset: int) -> int:
    """What is mirrored or has weights, with contiguous channels and with contiguous columns.

    There are five channels, or so many that they take two tiles beside each other; each has a
    weight, or all have one. Returns how many tensors that were.
    """
    count = 0
    for channels in (5, COLUMNS // dtype.itemsize + 1) if columns < 10 else (5,):
        for shape in ((2, channels, columns), (2, columns, channels)):
            inputs = random(2 * channels * columns + offset).to(dtype)
            x = inputs.to(DEVICE)[offset:].view(shape)
            x = (x if shape[1] == channels else x.transpose(1, 2)).requires_grad_()
            for case in cases:
                for weights in (channels, 1) if case.facts.weights else (0,):
                    run_matrix(case, x, weights)
                    count += 1
    return count


def run_matrix(case, x: torch.Tensor, weights: int) -> None:
    weight = torch.linspace(-1, 1, weights).to(x.dtype).to(DEVICE).requires_grad_()
    leaves = [x, weight] if weights > 0 else [x]
    y = case.facts.function(*leaves)
    # So small that the sum for a weight of all channels is no infinity in fp16.
    grads = torch.autograd.grad(y, leaves, torch.full_like(y, 0.0625))
    on_cpu = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = case.facts.torch_function(*on_cpu)
    theirs = torch.autograd.grad(expected, on_cpu, torch.full_like(expected, 0.0625))
    for ours, reference in zip((y, *grads), (expected, *theirs)):
        rounded = reference.to(x.dtype)
        torch.testing.assert_close(ours.detach().cpu(), rounded, rtol=0.02, atol=0.5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    parser.add_argument("--dtypes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--sizes", type=int, nargs="+", help="default: the edges, see above")
    parser.add_argument("--offsets", type=int, nargs="+", default=[0, 1], help="of --sizes")
    parser.add_argument(
        "--sharing",
        action="store_true",
        help="only what has threads that share data: masks, and sums over a weight's elements",
    )
    options = parser.parse_args(arguments)
    chosen = [(size, offset) for size in options.sizes or () for offset in options.offsets]
    cases, count = [c for c in CASES if not options.sharing or c.saves == "mask"], 0
    for backend in options.backends:
        with fused_act.use_backend(backend):
            for dtype in map(NAMES.__getitem__, options.dtypes):
                for size, offset in chosen or sizes_and_offsets(dtype):
                    for case in cases:
                        run(case, dtype, size, offset)
                        count += 1
                for columns, offset in chosen or columns_and_offsets(dtype):
                    count += run_matrices(MATRICES, dtype, columns, offset)
    print(f"sanitize: {count} tensors through {' and '.join(options.backends)}")


if __name__ == "__main__":
    main()
