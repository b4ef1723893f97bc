"""What `python -m benchmarks speed` measures, and what it makes of it."""

import itertools
import sys
import types
from functools import partial

import pytest
import torch

from benchmarks import providers, speed, speed_results, timing, workloads
from benchmarks.__main__ import parse
from benchmarks.providers import DTYPES
from benchmarks.speed import Method
from benchmarks.workloads import Workload
from fused_act.activations import FAMILIES, ROWS
from fused_act.dispatch import Kernels
from tests.shared.benchmarks import (
    CLOCK,
    StandInQueue,
    gradient,
    provider,
    provider_called,
    raise_value_error,
)

ELEMENTWISE = FAMILIES["elementwise"]


SMALL = Workload(ROWS["mish"], "fp32", 2**10, "contiguous")


def measure(functions, workload=SMALL, launches=("call",), direction="forward", **options):
    """The rows of one direction by provider, the clock replaced."""
    compared = [provider(name, function) for name, function in functions.items()]
    method = Method(dict.fromkeys(launches, CLOCK.turn), 3, 0.001)
    rows = speed.measure(workload, compared, method, **options)
    return {row["provider"]: row for row in rows if row["direction"] == direction}


def test_a_row_has_median_quantiles_and_share_of_the_copy():
    rows = measure({"one": CLOCK.taking(0.002, 0.006, 0.004)})
    assert list(rows) == ["copy", "one"]
    row = rows["one"]
    assert (row["median"], row["q20"], row["q80"]) == pytest.approx((4.0, 2.8, 5.2))
    assert (row["unit"], row["samples"]) == ("ms", 3)
    assert row["bytes"] == 2 * 4 * 2**10 == rows["copy"]["bytes"]
    assert row["share_of_copy"] == pytest.approx(0.25)
    assert row["gbps"] == pytest.approx(row["bytes"] / 4e6)
    assert rows["copy"]["share_of_copy"] == 1


def allocate(x):
    return torch.empty(2**50)


def raise_out_of_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("function", "skipped", "error"),
    [
        (allocate, "out of memory", ""),
        (raise_out_of_memory, "out of memory", ""),
        (raise_value_error, "", "ValueError: first line"),
    ],
)
@pytest.mark.parametrize("good_calls", [0, 2])
def test_who_fails_says_why_and_the_others_go_on(function, skipped, error, good_calls):
    left = [good_calls]

    def fails(x):
        left[0] -= 1
        return x if left[0] >= 0 else function(x)

    rows = measure({"fails": fails, "good": CLOCK.taking(0.002)})
    assert (rows["fails"]["skipped"], rows["fails"]["error"]) == (skipped, error)
    assert (rows["fails"]["median"], rows["fails"]["samples"]) == ("", 0)
    assert rows["good"]["samples"] == 3


def test_input_that_does_not_fit_is_skipped(monkeypatch):
    def contiguous(numel, dtype, device):
        return torch.empty(numel if device == "meta" else 2**60, dtype=dtype, device=device)

    monkeypatch.setitem(workloads.LAYOUTS, "contiguous", contiguous)
    rows = measure({"one": CLOCK.taking(0.002)})
    assert rows["one"]["skipped"] == "out of memory"


def test_an_error_that_another_workload_left_behind_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(Workload, "tensors", raise_value_error)
    rows = measure({"one": CLOCK.taking(0.002)})
    assert rows["one"]["error"] == rows["copy"]["error"] == "ValueError: first line"
    assert rows["one"]["samples"] == 0


def test_samples_of_the_device_and_of_the_host_are_not_mixed(monkeypatch):
    """The call begins to wait for the GPU after the first turns."""
    calls = []

    def call_in(queue):
        def call(x):
            calls.append(None)
            queue.launch(554e-6, 318e-6)
            if len(calls) > 12:
                queue.synchronize()
            return x.clone()

        return call

    row = timed_on_a_gpu(monkeypatch, call_in, ["call"])["one", "call"]
    assert row["bound"] == "host"
    assert row["q20"] > 0.5  # no sample of the first turn


def test_small_tensors_run_in_graphs_too_but_not_backward_through_autograd():
    method = Method(dict.fromkeys(("call", "graph"), CLOCK.turn), 1, 0.001)
    found = {
        numel: {
            (row["provider"], row["api"], row["direction"])
            for row in speed.measure(
                Workload(ROWS["mish"], "fp32", numel, "contiguous"),
                [provider_called("aten")],
                method,
            )
            if row["launch"] == "graph"
        }
        for numel in (speed.SMALL, 2 * speed.SMALL)
    }
    directions = ("forward", "backward", "forward+backward")
    expected = {
        *((name, "kernel", direction) for name in ("copy", "aten") for direction in directions),
        *(("aten", "public", direction) for direction in directions if direction != "backward"),
    }
    assert found == {speed.SMALL: expected, 2 * speed.SMALL: set()}


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda activation: activation.name)
def test_kernels_and_public_functions_compute_what_they_are_timed_for(activation):
    x, grad_output = torch.randn(2, 64)
    parameters = providers.parameters(activation)
    y = activation.torch_forward(x, *parameters, inplace=False)
    grad_input = gradient(activation, grad_output, x)
    kernels = providers.aten_kernels(activation)
    calls = {
        direction: workloads.kernel_call(kernels, parameters, direction, x, grad_output)
        for direction in ("inference", "forward", "backward", "forward+backward")
    }
    assert torch.equal(calls["inference"](), y)
    output = calls["forward"]()
    assert torch.equal(output, y)
    assert output is calls["forward"]()  # nothing is allocated
    assert torch.equal(calls["backward"](), grad_input)
    assert torch.equal(calls["forward+backward"]()[1], grad_input)

    function = providers.aten(activation, False)
    for direction, expected in {
        "inference": y, "forward": y, "backward": grad_input, "forward+backward": grad_input,
    }.items():  # fmt: skip
        call = workloads.public_call(function, direction, x, grad_output)
        found = call()
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found.detach(), expected)
        assert found.requires_grad == (direction == "forward")


def test_flag_gems_is_timed_where_it_has_the_op(monkeypatch):
    gems = types.SimpleNamespace(
        silu=torch.nn.functional.silu,
        silu_backward=torch.ops.aten.silu_backward.default,
        relu6=torch.nn.functional.relu6,
    )
    monkeypatch.setitem(sys.modules, "flag_gems", types.ModuleType("flag_gems"))
    monkeypatch.setitem(sys.modules, "flag_gems.ops", gems)
    x, grad_output = torch.randn(2, 16)
    offered = set()
    for activation, direction in itertools.product(
        FAMILIES["elementwise"], ("forward", "backward")
    ):
        kernels, parameters = (
            make(activation) for make in (providers.flag_gems_kernels, providers.parameters)
        )
        if workloads.offers(kernels, direction):
            offered.add(f"{activation.name} {direction}")
            call = workloads.kernel_call(kernels, parameters, direction, x, grad_output)
            if direction == "forward":
                expected = activation.torch_forward(x, *parameters, inplace=False)
            else:
                expected = gradient(activation, grad_output, x)
            assert torch.equal(call(), expected)
    assert offered == {"swish forward", "swish backward", "relu6 forward"}


@pytest.mark.parametrize("name", ["prelu", "learnable_swish", "crelu"])
@pytest.mark.parametrize("layout", workloads.LAYOUTS)
def test_other_families_are_timed_with_weights_and_channels(name, layout):
    activation = ROWS[name]
    workload = Workload(activation, "fp32", 2**12, layout)
    x, grad_output, *weights = workload.tensors()
    parameters = providers.parameters(activation)
    assert x.dim() == 4
    assert [weight.numel() for weight in weights] == [x.size(1)] * (name != "crelu")
    leaves = [each.clone().requires_grad_() for each in (x, *weights)]
    y = activation.torch_forward(*leaves, *parameters)
    grads = torch.autograd.grad(y, leaves, grad_output)
    for make in (providers.aten, providers.fused):
        function = make(activation, False)
        call = partial(workloads.public_call, function)
        assert torch.equal(call("forward", x, grad_output, *weights)(), y)
        for direction in ("backward", "forward+backward"):
            found = call(direction, x, grad_output, *weights)()
            assert all(map(torch.equal, found, grads)), direction
        assert make(activation, True) is None
    kernels = providers.aten_kernels(activation)
    call = workloads.kernel_call(kernels, parameters, "forward", x, grad_output, *weights)
    assert torch.equal(call(), y)
    assert not workloads.offers(kernels, "backward")


@pytest.mark.parametrize(
    ("is_ours", "expected"), [(True, torch.float32), (False, torch.bfloat16)], ids=["ours", "other"]
)
def test_kernels_of_ours_get_their_weights_in_fp32(is_ours, expected):
    dtypes = set()
    kernels = Kernels(lambda x, weight: dtypes.add((x.dtype, weight.dtype)))
    timed = provider("one", None, is_ours=is_ours, kernels=lambda activation: kernels)
    workload = Workload(ROWS["prelu"], "bf16", 2**8, "contiguous")
    *_, contender = speed.contenders(workload, "forward", {timed: None}, ["call"])
    contender.make(*workload.tensors())()
    assert dtypes == {(torch.bfloat16, expected)}


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ROWS.values(), ids=list(ROWS))
def test_kernels_of_ours_compute_what_they_are_timed_for(activation):
    workload = Workload(activation, "fp32", 2**10, "contiguous")
    x, grad_output, *weights = workload.tensors()
    parameters = providers.parameters(activation)
    leaves = [each.clone().requires_grad_() for each in (x, *weights)]
    y = providers.aten(activation, False)(*leaves)
    grads = torch.autograd.grad(y, leaves, grad_output)
    triton = provider_called("triton")
    make = workloads.with_fp32_weights(
        partial(workloads.kernel_call, triton.kernels(activation), parameters, "forward+backward")
    )
    with triton.selected():
        _, found = make(x, grad_output, *weights)()
    for ours, theirs in zip(found if weights else [found], grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("direction", "mirrored", "mask"),
    [
        ("inference", 3 * 2048, 0),
        ("forward", 3 * 2048, 256),
        ("backward", 3 * 2048, 256),
        ("forward+backward", 6 * 2048, 512),
    ],
)
def test_bytes_of_crelu(direction, mirrored, mask):
    """1,024 elements of bf16 are 2,048 bytes, and two bits for each are 256."""
    assert workloads.bytes_moved(direction, torch.bfloat16, 1024, True, 2) == mirrored + mask
    without = {"backward": 2048, "forward+backward": 2048}.get(direction, 0)
    assert workloads.bytes_moved(direction, torch.bfloat16, 1024, False, 2) == mirrored + without


# Whose time it is


def timed_on_a_gpu(monkeypatch, call_in, launches=("call", "graph")):
    """The rows of what `call_in(queue)` makes, by provider and launch, with a stand-in queue."""
    queue = StandInQueue(clearing=60e-6)
    copy = partial(queue.launch, 5e-6, 159e-6)
    monkeypatch.setattr(workloads, "copy_call", lambda bytes_, *tensors: copy)
    monkeypatch.setattr(Workload, "directions", lambda workload: ["forward"])
    turns = {"call": timing.GpuTurn, "graph": timing.graph_turn}
    turns = {name: partial(turns[name], queue=queue) for name in launches}
    found = speed.measure(SMALL, [provider("one", call_in(queue))], Method(turns, 3, 0.003))
    return {(row["provider"], row["launch"]): row for row in found if row["direction"] == "forward"}


def test_rows_of_a_gpu_have_the_time_of_the_device_and_that_of_the_host(monkeypatch):
    def call_in(queue):
        def call(x):
            queue.launch(554e-6, 318e-6)
            return x.clone()

        return call

    rows = timed_on_a_gpu(monkeypatch, call_in)
    one = rows["one", "call"]
    assert (one["median"], one["host_us"]) == pytest.approx((0.318, 554.0))
    assert one["share_of_copy"] == pytest.approx(0.5)
    assert one["bound"] == "device"
    graph = rows["one", "graph"]
    assert graph["median"] == pytest.approx(0.318, rel=0.01)
    assert (graph["host_us"], graph["bound"]) == ("", "device")


def test_a_row_that_the_host_bounds_says_so(monkeypatch):
    def call_in(queue):
        def call(x):
            queue.launch(554e-6, 318e-6)
            queue.synchronize()
            return x.clone()

        return call

    row = timed_on_a_gpu(monkeypatch, call_in, ["call"])["one", "call"]
    assert row["bound"] == "host"
    assert speed_results.cell(row).endswith("HOST")
    assert not speed_results.quotable(row | {"gpu": "H200"})


def test_rows_of_a_cpu_tell_nothing_of_a_host():
    row = measure({"one": CLOCK.taking(0.002)})["one"]
    assert (row["host_us"], row["bound"]) == ("", "")
    assert speed_results.quotable(row | {"gpu": ""})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"api": "kernel", "numel": 2**27}, True),
        ({"api": "kernel", "numel": 2**22}, False),
        ({"api": "kernel", "numel": 2**27, "launch": "graph"}, False),
        ({"api": "public", "numel": 2**30}, True),
        ({"api": "public", "numel": 2**30, "median": 0.59}, False),
        ({"api": "public", "numel": 2**30, "launch": "graph"}, False),
        ({"api": "kernel", "numel": 2**27, "median": ""}, False),
        ({"api": "public", "numel": 2**10, "gpu": "", "median": 0.01}, True),
        # With a column `bound` the row itself says it.
        ({"api": "public", "numel": 2**10, "median": 0.002, "bound": "device"}, True),
        ({"api": "kernel", "numel": 2**10, "launch": "graph", "bound": "device"}, True),
        ({"api": "kernel", "numel": 2**27, "bound": "host"}, False),
        ({"api": "kernel", "numel": 2**27, "median": "", "bound": "device"}, False),
    ],
)
def test_what_the_host_bounds_is_not_quoted(fields, expected):
    row = {"gpu": "H200", "launch": "call", "median": 2.0} | fields
    assert speed_results.quotable({column: str(value) for column, value in row.items()}) is expected


# What is measured


@pytest.mark.parametrize("layout", workloads.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    workload = Workload(ROWS["relu6"], dtype, 2**10, layout)
    x = workload.x("cpu")
    assert (x.dtype, x.numel()) == (DTYPES[dtype], workload.numel())
    assert x.float().std() > 0.5  # all of it is drawn
    assert x.is_contiguous() == (layout != "channels_last")
    assert layout != "channels_last" or x.is_contiguous(memory_format=torch.channels_last)
    assert (x.numel() % 16 != 0) == (layout == "odd")
    assert (x.data_ptr() % 16 != 0) == (layout == "misaligned")


def test_grid(monkeypatch):
    def grid(*arguments):
        return speed.grid(parse(["speed", *arguments]))

    monkeypatch.setattr(speed, "ON_GPU", True)
    default = grid()
    assert len(default) == len(set(default)) == 7
    assert default[0] == ("bf16", 2**27, "contiguous")
    assert default[-2:] == [("fp16", 2**27, "contiguous"), ("fp32", 2**26, "contiguous")]
    assert {numel for dtype, numel, _ in default if dtype == "bf16"} >= {2**10, 2**22}
    assert {layout for _, _, layout in default} == {"contiguous"}
    assert grid("--edges") == [
        ("bf16", 2**30, "contiguous"),
        *(("bf16", 2**27, layout) for layout in ("channels_last", "odd", "misaligned")),
    ]  # fmt: skip
    assert len(grid("--quick")) == 2
    assert len(grid("--quick", "--layouts", "odd", "misaligned")) == 4
    assert grid("--sizes", "2^10", "1024", "--dtypes", "fp32") == [("fp32", 1024, "contiguous")]
    assert len(grid("--full")) == 21 * len(DTYPES) * len(workloads.LAYOUTS)
    assert grid("--sizes", "2^20", "1000", "--dtypes", "fp32") == [
        ("fp32", 2**20, "contiguous"), ("fp32", 1000, "contiguous"),
    ]  # fmt: skip
    assert set(grid("--dtypes", "fp16", "--layouts", "odd")) == {
        ("fp16", numel, "odd") for numel in (2**10, 2**14, 2**18, 2**22, 2**27)
    }
    monkeypatch.setattr(speed, "ON_GPU", False)
    assert max(numel for _, numel, _ in grid()) == 2**22
    assert grid("--quick") == [("bf16", 2**20, "contiguous")]
    assert {numel for _, numel, _ in grid("--edges")} == {2**20}


@pytest.mark.parametrize(
    ("options", "on_gpu", "what", "expected"),
    [
        ((), True, ("bf16", 2**14, "contiguous"), False),
        ((), True, ("bf16", 2**27, "contiguous"), True),
        ((), True, ("fp32", 2**27, "contiguous"), False),
        ((), True, ("bf16", 2**27, "odd"), False),
        (("--dtypes", "fp32"), True, ("fp32", 2**27, "contiguous"), True),
        ((), False, ("fp32", 2**14, "odd"), True),
        (("--full",), True, ("fp32", 2**14, "odd"), True),
        (("--sizes", "2^14"), True, ("fp32", 2**14, "odd"), True),
    ],
)
def test_on_a_gpu_large_tensors_of_the_first_dtype_are_compiled(
    monkeypatch, options, on_gpu, what, expected
):
    monkeypatch.setattr(speed, "ON_GPU", on_gpu)
    arguments = parse(["speed", *options])
    workload = Workload(ROWS["mish"], *what)
    compiled, eager = (provider_called(name) for name in ("compile(aten)", "aten"))
    assert speed.takes_part(compiled, workload, arguments) is expected
    assert speed.takes_part(eager, workload, arguments)


# Verdicts


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((0.4, 0.5, 0.6), "2.00x faster"),
        ((0.4, 0.5, 0.95), "2.00x even"),
        ((1.3, 2.0, 2.1), "0.50x slower"),
    ],
)
def test_verdicts_are_of_ours_beside_the_best_alternative(times, expected):
    what = {"api": "public", "launch": "call", "activation": "mish", "direction": "forward"}
    what |= {"dtype": "fp32", "numel": 1024, "layout": "contiguous", "samples": 3}
    all_times = {
        "copy": (0.1, 0.1, 0.1), "naive": (3.0, 3.0, 3.0), "aten": (0.9, 1.0, 1.2), "triton": times,
    }  # fmt: skip
    rows = [
        what | {"provider": name, **dict(zip(("q20", "median", "q80"), found))}
        for name, found in all_times.items()
    ]
    ((_, best, ours),) = speed_results.verdicts(rows)
    assert best["provider"] == "aten"
    assert {name: str(one).strip() for name, one in ours.items()} == {"triton": expected}
