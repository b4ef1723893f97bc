"""Sizes, offsets, strides, guard bands: the kernel path on tensors of every shape and layout.

On a GPU both backends run, without one the Triton kernels in the interpreter. The loops of the CUDA
kernels run on the host in test_host_kernels.py.
"""

import functools

import pytest
import torch

import fused_act
from fused_act import ops
from fused_act.backends import triton
from fused_act.families import elementwise_ops, mirrored, raw_op, weighted
from fused_act.families.mirrored import Layout
from fused_act.families.raw_op import is_dense
from tests.shared import accuracy, matrices
from tests.shared.cases import (
    BACKENDS,
    CASES,
    DEVICE,
    INTERPRET,
    all_backends,
    all_dtypes,
    all_rows,
    elementwise_rows,
    of_family,
)
from tests.shared.layouts import (
    GRAD_LAYOUTS,
    LARGE,
    LAYOUTS,
    SIZES,
    Guarded,
    all_layouts,
    check,
)

pytestmark = pytest.mark.usefixtures("forced")

# The interpreter takes long for all sizes, so that one test takes a part of them.
PARTS = 3
all_parts = pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"part{part}")


@all_rows
@all_backends
@all_dtypes
@all_layouts
def test_every_layout(case, backend, dtype, layout):
    """Every layout of x, each with every layout of grad_output."""
    x = LAYOUTS[layout](dtype=dtype, device=DEVICE)
    before = x.clone()
    check(case, x, *GRAD_LAYOUTS.values())
    assert torch.equal(x, before)


@all_rows
@all_backends
@all_dtypes
@all_parts
def test_sizes_and_offsets(case, backend, dtype, part):
    """Every size, at every storage offset; at one of them in the interpreter, which sees none."""
    for size in SIZES[part::PARTS]:
        for offset in [size % 9] if INTERPRET else range(9):
            x = 4 * torch.randn(size + offset, device=DEVICE).to(dtype)[offset:]
            check(case, x, torch.randn_like)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
@all_backends
@pytest.mark.parametrize("size", [2**16 + 1, pytest.param(LARGE, marks=pytest.mark.full)])
def test_a_large_odd_size(case, backend, size):
    """Many blocks. The interpreter takes a minute for the larger one."""
    check(case, 4 * torch.randn(size, device=DEVICE).bfloat16(), torch.randn_like)


@all_rows
@all_backends
def test_negative_bit_views(case, backend):
    """Their data_ptr() leads to values of the other sign."""
    x = torch.randn(9, dtype=torch.complex64, device=DEVICE).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(case.function(x), case.function(x.resolve_neg()))
    leaf = torch.randn(9, device=DEVICE, requires_grad=True)
    y = case.function(leaf)
    grad_output = torch.randn(y.numel(), dtype=torch.complex64, device=DEVICE).conj().imag
    grads = (
        torch.autograd.grad(y, leaf, each, retain_graph=True)
        for each in (grad_output, grad_output.resolve_neg())
    )
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_one_by_one_images_are_not_copied(backend):
    """channels_last and contiguous differ there in strides that nothing steps by."""
    from fused_act.backends.triton.tiles import with_layout_of

    contiguous = torch.randn(3, 5, 1, 1, device=DEVICE)
    channels_last = contiguous.as_strided((3, 5, 1, 1), (5, 1, 5, 5))
    assert with_layout_of(channels_last, contiguous) is contiguous
    other = torch.randn(5, 3, 1, 1, device=DEVICE).transpose(0, 1)
    copy = with_layout_of(contiguous, other)
    assert copy.stride() == contiguous.stride()
    assert torch.equal(copy, other)


@elementwise_rows
@all_backends
@all_dtypes
def test_nothing_outside_out_is_written(case, backend, dtype):
    forward_out = ops.kernels(f"fused_act_{backend}")[case.name].forward_out
    for size in SIZES:
        x = 4 * torch.randn(size, device=DEVICE).to(dtype)
        out = Guarded(size, dtype, offset=size % 9, device=DEVICE)
        forward_out(x, *case.parameters, out=out.inside)
        accuracy.assert_near(case, "forward", out.inside, x)
        out.assert_untouched_outside()


@pytest.fixture
def allocated(monkeypatch):
    """What the Triton backend allocates, each between guard bands, as it comes."""
    found = []

    def empty_strided(size, stride, dtype, device):
        found.append(Guarded(torch.Size(size).numel(), dtype, device=device))
        return found[-1].inside.as_strided(size, stride, found[-1].inside.storage_offset())

    def empty(size, dtype, device):
        return empty_strided(size, torch.empty(size, device="meta").stride(), dtype, device)

    def empty_like(x):
        stride = torch.empty_like(x, device="meta").stride()
        return empty_strided(x.shape, stride, x.dtype, x.device)

    class Torch:
        """torch, as what allocates sees it, with guarded allocations."""

        __getattr__ = staticmethod(functools.partial(getattr, torch))

    guarded = Torch()
    guarded.empty, guarded.empty_like, guarded.empty_strided = empty, empty_like, empty_strided
    for module in (raw_op, elementwise_ops, weighted, mirrored):
        monkeypatch.setattr(module, "torch", guarded)
    return found


@all_rows
@pytest.mark.parametrize("backend", BACKENDS[:1])
@all_dtypes
@all_parts
def test_nothing_outside_an_allocation_is_written(case, backend, dtype, part, allocated):
    """y, twice, mask and grad_input; the CUDA kernels' loops are tested so on the host.

    The sums of a weight's gradient are not guarded: `test_layouts_and_sums` adds them up.
    """
    kernels = triton.implementations(case.row)
    is_matrix = case.row.family != "elementwise"
    sizes = (matrices.COLUMNS if is_matrix else SIZES)[part::PARTS]
    for i, size in enumerate(sizes):
        # Rows of every length.
        shape = ((1, 3, 67)[i % 3] if size < 64 else 3, size) if is_matrix else size
        x = 4 * torch.randn(shape, device=DEVICE)
        matrices.run_raw_ops(case, kernels, x.to(dtype))
    assert len(allocated) == len(sizes) * (4 if case.saves == "mask" else 3)
    for output in allocated:
        output.assert_untouched_outside()


# A weight for each channel, and its gradient, which is a sum.


@of_family("weighted")
@all_backends
@matrices.all_permutations
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per_channel"])
@all_parts
def test_layouts_and_sums(case, backend, layout, per_channel, part):
    """Strides as torch has them, sums as in float64, and twice the same bits."""
    kernels = fused_act.dispatch.BACKENDS[backend].ready().kernels[case.name]
    for shape, dtype in matrices.shapes_and_dtypes(layout)[part::PARTS]:
        x, weight = matrices.inputs(shape, layout, dtype, per_channel)
        grad_output = torch.randn_like(x)
        y = kernels.forward(x, weight)
        grads = kernels.backward(grad_output, x, weight)
        assert y.stride() == grads[0].stride() == torch.empty_like(x).stride()
        matrices.check_gradients(case, x, weight, grad_output, y, *grads)
        again = kernels.backward(grad_output, x, weight)
        assert all(map(torch.equal, grads, again))


# A mirrored output, along every dimension.


def along(case, dim):
    """Ours and torch's, along `dim`."""
    return (functools.partial(f, dim=dim) for f in (case.facts.function, case.facts.torch_function))


@of_family("mirrored")
@all_backends
@all_layouts
def test_mirrored_layouts(case, backend, layout):
    """Every layout of x along every dimension, with every layout of grad_output."""
    x = LAYOUTS[layout](dtype=torch.float32, device=DEVICE)
    for dim in range(-x.dim(), x.dim()):
        # They are many, and dimensions from the back are those from the front.
        makes = GRAD_LAYOUTS.values() if dim < 0 else [torch.randn_like]
        matrices.assert_as_torch(*along(case, dim), x, *makes)


@of_family("mirrored")
@all_backends
@all_dtypes
def test_mirrored_sizes(case, backend, dtype):
    """Rows of every length."""
    for i, columns in enumerate(matrices.COLUMNS):
        x = 4 * torch.randn((1, 3, 67)[i % 3] if columns < 64 else 3, columns, device=DEVICE)
        matrices.assert_as_torch(*along(case, 1), x.to(dtype), torch.randn_like)


@of_family("mirrored")
@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_3d", "gapped"])
def test_mirrored_strides_are_those_of_cat(case, backend, layout):
    x = LAYOUTS[layout](dtype=torch.float16, device=DEVICE)
    for dim in range(x.dim()):
        ours, theirs = along(case, dim)
        assert ours(x).stride() == theirs(x).stride()


@all_layouts
def test_mirrored_result_is_dense_in_the_order_of_x(layout):
    """Also where torch's cat gives up the order: for a transposed x, say."""
    x = torch.empty_like(LAYOUTS[layout](dtype=torch.float32))
    for dim in range(x.dim()):
        made = Layout.of(x.shape, x.stride(), dim)
        assert is_dense(made.shape, made.stride)
        assert made.rows * made.columns == x.numel()
        stepped = [i for i in range(x.dim()) if x.shape[i] > 1]
        if x.numel() > 0:
            by_stride = sorted(stepped, key=x.stride().__getitem__)
            assert sorted(stepped, key=made.stride.__getitem__) == by_stride
