"""A call launches what Triton itself would launch for it; no GPU needed, see triton_driver.py."""

import dataclasses
import inspect
import random
import re
import threading

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

from fused_act.backends import triton as backend
from fused_act.backends.triton import launcher
from fused_act.backends.triton.launcher import Launcher
from fused_act.dispatch import DTYPES, Backend, Kernels
from tests.shared import cpu_ops
from tests.shared.cases import all_dtypes, all_rows
from tests.shared.triton_driver import Pointer, Stub, example, launch_publicly, stubbed

_, _, ARGUMENTS, CONSTANTS = example()


@pytest.fixture
def stub():
    with stubbed(Stub()) as found:
        yield found


def forward_launcher() -> Launcher:
    return example()[0]


def public_launches(monkeypatch) -> list:
    """What `kernel[grid]` was called with from now on."""
    found = []
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        found.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return found


def assert_launches_what_triton_does(stub, launch: Launcher, *call) -> None:
    """At the first call and at one that takes what was kept."""
    stub.launched()
    launch(*call)
    launch(*call)
    launch_publicly(launch, *call)
    first, kept, public = stub.launched()
    assert first == public
    assert kept == public


def backend_of(case) -> Backend:
    """The Triton backend for CPU tensors, with one row."""

    def load() -> dict[str, Kernels]:
        implementations = backend.implementations(case.row)
        fields = {field: implementations[op.name] for field, op in case.row.raw_ops().items()}
        return {case.name: Kernels(**fields)}

    return Backend("stub", lambda: None, load, ("cpu",))


def inputs(dtype):
    """Inputs of sizes that Triton tells apart, aligned and not, and of layouts."""
    for numel in (1, 15, 16, 17, 4096, 4097):
        yield torch.zeros(numel, dtype=dtype)
        yield torch.zeros(numel + 1, dtype=dtype)[1:]
    for shape in ((2, 16, 3, 5), (3, 5, 4, 4)):
        yield torch.zeros(shape, dtype=dtype)
        yield torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def argument_of(case, x: torch.Tensor) -> tuple:
    """Parameters; or a weight for each channel."""
    if case.facts.weight_derivative is None:
        return case.parameters
    weight = torch.zeros(x.size(1) if x.dim() > 1 else 1, dtype=x.dtype)
    return (weight.requires_grad_(),)


@all_rows
@all_dtypes
def test_every_row_launches_what_triton_would(monkeypatch, stub, case, dtype):
    stub.device = -1  # that of CPU tensors
    calls = []

    class Noted(Launcher):
        def __call__(self, *call):
            calls.append((self, call))
            super().__call__(*call)

    monkeypatch.setattr(f"{backend.__name__}.{case.row.family}.Launcher", Noted)
    with cpu_ops.forced(backend_of(case)):
        for x in inputs(dtype):
            for options in ({}, {"inplace": True})[: 1 + case.has_inplace]:
                x = x.detach().requires_grad_()
                argument = argument_of(case, x)
                case.facts.function(x * 1 if options else x, *argument, **options).sum().backward()
            case.facts.function(x.detach(), *argument_of(case, x))
    first = stub.launched()
    assert len(first) == len(calls) == (5 if case.has_inplace else 3) * len(list(inputs(dtype)))
    taken = public_launches(monkeypatch)
    for launch, call in calls:
        Launcher.__call__(launch, *call)
    kept = stub.launched()
    assert not taken
    for launch, call in calls:
        launch_publicly(launch, *call)
    public = stub.launched()
    assert first == public
    assert kept == public


def test_calls_are_alike_where_triton_says_so(stub):
    """Whatever distinguishes two calls for Triton does so for a launcher, and nothing else."""
    draw = random.Random(0)
    launch = forward_launcher()
    sizes = [1, 2, 15, 16, 17, 32, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**40 + 1]

    def pointer(device):
        dtype = draw.choice((*DTYPES, torch.uint8))
        return Pointer(dtype, 2**40 + draw.choice((0, 2, 4, 8, 16, 256)), device)

    for _ in range(3000):
        device = draw.choice((0, 1))
        stub.device = draw.choice((0, 1))
        call = (
            draw.choice((1, 7)),
            (
                pointer(device),
                draw.choice((None, pointer(device))),
                draw.choice((None, pointer(device))),
                draw.choice(sizes),
                (draw.choice((0.0, 1.0, 16.0, 0.5, float("inf"))),),
            ),
            (draw.choice((1024, 2048)),),
        )
        assert_launches_what_triton_does(stub, launch, *call)
    assert len(launch.compiled) == len(stub.loaded)


def test_a_call_launches_on_the_device_of_its_tensor(stub):
    launch = forward_launcher()
    x = dataclasses.replace(ARGUMENTS[0], device=1)
    for stub.device in (0, 1, 0, 2):
        before = stub.device
        launch(1, (x, *ARGUMENTS[1:]), CONSTANTS)
        assert stub.device == before
    assert [(found.device, found.stream) for found in stub.launched()] == [(1, 1001)] * 4


HOOKS = {
    "added": lambda patch, hook: (
        knobs.runtime.launch_enter_hook.add(hook),
        knobs.runtime.launch_exit_hook.add(hook),
    ),
    "in the place of a chain": lambda patch, hook: (
        patch.setattr(knobs.runtime, "launch_enter_hook", hook),
        patch.setattr(knobs.runtime, "launch_exit_hook", hook),
    ),
}


@pytest.mark.parametrize("put", HOOKS.values(), ids=HOOKS)
def test_hooks_on_the_launch_are_called(monkeypatch, stub, put):
    """Those of profilers, which may come when a kernel has been launched often."""
    launch, seen = forward_launcher(), []
    for name in ("launch_enter_hook", "launch_exit_hook"):
        calls = getattr(type(knobs.runtime), name).calls
        monkeypatch.setattr(getattr(type(knobs.runtime), name), "calls", list(calls))

    def hook(metadata):
        seen.append(metadata.get())

    launch(1, ARGUMENTS, CONSTANTS)
    launch(1, ARGUMENTS, CONSTANTS)
    put(monkeypatch, hook)
    launch(1, ARGUMENTS, CONSTANTS)
    assert [found["name"] for found in seen] == ["forward_kernel"] * 2
    assert {found["stream"] for found in seen} == {1000}
    assert len(set(stub.launched())) == 1


def test_hooks_before_a_run_are_called(monkeypatch, stub):
    launch, seen = forward_launcher(), []
    launch(1, ARGUMENTS, CONSTANTS)
    monkeypatch.setattr(
        launch.kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(args[:4])]
    )
    launch(1, ARGUMENTS, CONSTANTS)
    assert seen == [ARGUMENTS[:4]]


# What the launch of this Triton looks at.
USED = set(re.findall(r"knobs\.(\w+\.\w+)", inspect.getsource(JITFunction.run)))
KNOBS = {
    "runtime.debug": True,
    "compilation.instrumentation_mode": "consan",
    "runtime.add_stages_inspection_hook": lambda: ("key", "hash"),
}


@pytest.mark.parametrize("name", sorted(KNOBS.keys() & USED))
def test_knobs_that_change_what_is_compiled_do_so_at_any_time(monkeypatch, stub, name):
    launch = forward_launcher()
    launch(1, ARGUMENTS, CONSTANTS)
    with monkeypatch.context() as patch:
        patch.setattr(f"triton.knobs.{name}", KNOBS[name])
        launch(1, ARGUMENTS, CONSTANTS)
        launch(2, ARGUMENTS, CONSTANTS)
    launch(1, ARGUMENTS, CONSTANTS)
    assert [found.kernel for found in stub.launched()] == [1, 2, 2, 1]


def test_no_other_knob_changes_what_a_launch_compiles():
    """A new one of Triton's must be looked at in `Launcher.is_plain`."""
    assert {"runtime.debug", "compilation.instrumentation_mode"} <= USED
    known = {*KNOBS, "runtime.launch_enter_hook", "runtime.launch_exit_hook"}
    # This one says how one of the modes of instrumentation works.
    assert known | {"compilation.fpsan_homomorphic_casts"} >= USED


def test_what_is_kept_is_what_triton_launches(monkeypatch):
    """Of what Triton compiles, by the attributes that Triton takes."""
    monkeypatch.setattr(launcher, "IS_KNOWN", True)
    with stubbed(Stub(), compiles=True) as stub:
        launch = forward_launcher()
        assert_launches_what_triton_does(stub, launch, 3, ARGUMENTS, CONSTANTS)
        assert stub.loaded == ["forward_kernel"]
        (compiled,) = launch.compiled.values()
        compiled.module = None  # or newer versions of Triton would unload it


def test_an_unknown_triton_launches_by_itself(monkeypatch, stub):
    monkeypatch.setattr(launcher, "IS_KNOWN", False)
    launch, taken = forward_launcher(), public_launches(monkeypatch)
    assert_launches_what_triton_does(stub, launch, 3, ARGUMENTS, CONSTANTS)
    assert len(taken) == 3
    assert not launch.compiled


def test_what_is_not_compiled_is_not_kept(monkeypatch, stub):
    """A hook may keep Triton from it."""
    launch = forward_launcher()
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "_call_hook", lambda *args, **kwargs: True)
        launch(1, ARGUMENTS, CONSTANTS)
    assert not stub.launched()
    assert not launch.compiled
    assert_launches_what_triton_does(stub, launch, 1, ARGUMENTS, CONSTANTS)


def test_two_threads_may_come_first(monkeypatch, stub):
    """Both find nothing kept, and both compile."""
    launch, both = forward_launcher(), threading.Barrier(2)
    compile_ = triton.compiler.compile

    def compile_together(*args, **kwargs):
        both.wait(timeout=60)
        return compile_(*args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", compile_together)
    calls = [(blocks, ARGUMENTS, CONSTANTS) for blocks in (1, 2)]
    threads = [threading.Thread(target=launch, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call in calls:
        launch(*call)
    found = stub.launched()
    assert sorted(each.grid[0] for each in found) == [1, 1, 2, 2]
    assert {each.arguments for each in found} == {found[0].arguments}
    assert len(launch.compiled) == 1
