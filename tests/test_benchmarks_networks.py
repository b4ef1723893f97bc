"""What `python -m benchmarks networks` measures, and how it goes on where something fails."""

import contextlib
import dataclasses
import itertools
import math
import sys
import types
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity

import fused_act
from benchmarks import environment, models, networks, traces
from benchmarks.__main__ import parse
from benchmarks.environment import read_csv
from benchmarks.models import NETWORKS
from benchmarks.networks import INFERENCE, MODES, TRAINING, Case, Mode, beside_torch, measure
from tests.shared.benchmarks import raise_value_error, status

pytestmark = pytest.mark.usefixtures("one_thread")

# What the first results have, which others have to be compared with.
OLDER_COLUMNS = ["net", "mode", "replaced", "ms", "min", "peak_gb", "step_gb", "loss"]
HERE = [name for name in MODES if name != "fused triton"]  # without a GPU
KIB = 2**10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Mish(), nn.Dropout(0.5))

    def forward(self, x):
        return self.layers(x)


def tiny() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(16, 8, bias=False))


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    shape = (4, 5, 16)
    monkeypatch.setitem(NETWORKS, "tiny", models.Network(tiny, "Block", 8, shape, shape))


@pytest.fixture
def command(tmp_path):
    """Runs the command on the tiny network; returns its exit status, and the rows it wrote."""

    def run(*arguments):
        names = () if "--networks" in arguments else ("--networks", "tiny")
        found = status("networks", "--results", tmp_path, "--rounds", 2, *names, *arguments)
        path = tmp_path / "networks.csv"
        return found, read_csv(path) if path.exists() else []

    return run


def tiny_rows(direction=TRAINING, names=HERE, rounds=2):
    return {row["mode"]: row for row in measure(Case("tiny", direction, False), names, rounds)}


def test_modes_take_turns_step_by_step(monkeypatch):
    steps, take = [], networks.Copy.step

    def recorded(self):
        steps.append(self.mode)
        return take(self)

    monkeypatch.setattr(networks.Copy, "step", recorded)
    rows = tiny_rows(rounds=4)
    count = len(HERE)
    rounds = [steps[i : i + count] for i in range(count * networks.WARM_UP, len(steps), count)]
    assert len(rounds) == 4
    for each in rounds:
        assert sorted(map(id, each)) == sorted(id(MODES[name]) for name in HERE)
    assert rounds[0] != rounds[1]
    assert {row["samples"] for row in rows.values()} == {4}


def test_modes_begin_alike(monkeypatch):
    begun, prepare = [], networks.Copy.__init__

    def recorded(self, case, mode, module, batch):
        prepare(self, case, mode, module, batch)
        weights = [each.detach().clone() for each in self.module.parameters()]
        begun.append((self, weights, self.batch))

    monkeypatch.setattr(networks.Copy, "__init__", recorded)
    tiny_rows()
    assert len(begun) == len(HERE)
    for copy, weights, batch in begun:
        assert copy.module.training
        for ours, first in zip(weights, begun[0][1], strict=True):
            assert torch.equal(ours, first)
        for ours, first in zip(batch, begun[0][2], strict=True):
            assert torch.equal(ours, first)
    storages = [next(copy.module.parameters()).data_ptr() for copy, *_ in begun]
    assert len(set(storages)) == len(HERE)


@pytest.mark.parametrize("direction", [TRAINING, INFERENCE])
def test_losses_on_a_cpu_are_the_same_bit_for_bit(direction):
    names = [name for name in HERE if MODES[name].takes_part(direction, False)]
    rows = tiny_rows(direction, names)
    assert len(names) == (5 if direction == TRAINING else 2)
    assert not any(row["error"] for row in rows.values())
    assert len({row["loss"] for row in rows.values()}) == 1
    assert rows["torch"]["loss"] > 0
    assert {row["replaced"] for row in rows.values()} == {0, 2}
    for row in rows.values():
        assert row["per_second"] * row["ms"] == pytest.approx(1000 * 4 * 5)


def test_a_loss_is_no_part_of_inference(monkeypatch):
    during, loss_of, go = [], networks.Copy.loss_of, networks.Copy.go

    def recorded(self, *arguments):
        if hasattr(self, "goes"):  # not before the first step, where modes are compared
            during.append(self.goes)
        return loss_of(self, *arguments)

    def recorded_go(self):
        self.goes = True
        found = go(self)
        self.goes = False
        return found

    monkeypatch.setattr(networks.Copy, "loss_of", recorded)
    monkeypatch.setattr(networks.Copy, "go", recorded_go)
    tiny_rows(INFERENCE, ["torch"])
    assert set(during) == {False}
    during.clear()
    tiny_rows(TRAINING, ["torch"])
    assert set(during) == {True}


def test_the_loss_is_that_of_weights_that_were_trained(monkeypatch):
    untrained = tiny_rows()["torch"]["loss"]
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    assert tiny_rows()["torch"]["loss"] != untrained


class Wrong(nn.Module):
    """In the place of an activation, what is none."""

    def __init__(self, activation, kind):
        super().__init__()
        self.activation, self.compute = activation, WRONG[kind]

    def forward(self, x):
        return self.compute(self.activation, x)


WRONG = {
    "identity": lambda activation, x: x.clone(),
    "zero": lambda activation, x: 0 * x,
    "half": lambda activation, x: activation(x) / 2,
    "ReLU": lambda activation, x: x.relu(),
    "detached": lambda activation, x: activation(x).detach(),
    "no number": lambda activation, x: math.nan * x,
}


def replace_wrongly(kind, module, report):
    """What stands in for `replace_activations`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.ReLU6, nn.Mish, nn.SiLU)):
                setattr(parent, name, Wrong(child, kind))


def wrong_cases():
    for name in models.SMALL:
        for kind in ("identity", "zero", "half", "detached", "no number"):
            yield name, TRAINING, kind
        for kind in ("zero", "half"):
            yield name, INFERENCE, kind
    yield "small mobilenet_v2 relu6", TRAINING, "ReLU"


@pytest.fixture
def never_timed(monkeypatch):
    """Modes are compared alone."""
    monkeypatch.setattr(networks, "WARM_UP", 0)
    monkeypatch.setattr(networks.Copy, "step", lambda self: (1.0, 2.0))
    monkeypatch.setattr(networks.Copy, "step_bytes", lambda self: 0)


@pytest.mark.parametrize(("name", "direction", "kind"), list(wrong_cases()))
@pytest.mark.usefixtures("never_timed")
def test_a_wrong_activation_is_an_error(monkeypatch, name, direction, kind):
    monkeypatch.setattr(fused_act, "replace_activations", partial(replace_wrongly, kind))
    ours, torchs = measure(Case(name, direction, False), ["fused", "torch"], 1)
    assert not torchs["error"]
    assert " of their size off torch's" in ours["error"]
    found = ours["error"].partition(" are ")[0]
    if direction == INFERENCE or kind == "half":
        assert found == "outputs"
    elif kind in ("ReLU", "detached"):
        assert found == "gradients"
    if kind == "ReLU":  # with norms as they are it would be 0.02, too near to the bound
        assert float(ours["error"].split()[2]) > 0.1


@pytest.mark.parametrize("direction", [TRAINING, INFERENCE])
@pytest.mark.parametrize("name", models.SMALL)
@pytest.mark.usefixtures("never_timed")
def test_all_modes_compute_what_torchs_modules_do(monkeypatch, name, direction):
    compared, judge = [], networks.what_is_off

    def recorded(ours, theirs, what):
        compared.append(what)
        return judge(ours, theirs, what)

    monkeypatch.setattr(networks, "what_is_off", recorded)
    names = [mode for mode in HERE if MODES[mode].takes_part(direction, False)]
    rows = measure(Case(name, direction, False), names, 1)
    assert not [row["error"] for row in rows if row["error"]]
    each = ["outputs", "gradients"] if direction == TRAINING else ["outputs"]
    assert compared == each * (len(names) - 1)


def test_what_is_wrong_is_said_and_timed_all_the_same(monkeypatch, command, capsys):
    monkeypatch.setattr(fused_act, "replace_activations", partial(replace_wrongly, "detached"))
    exit_status, rows = command("--modes", "torch", "fused")
    assert exit_status == 1
    torchs, ours = rows[:2]
    assert not torchs["error"]
    assert ours["error"].startswith("gradients are ")
    assert ours["ms"]
    assert f"tiny, training, fused: failed: {ours['error']}" in capsys.readouterr().out


def test_how_far_what_is_computed_may_be_off():
    theirs = [torch.full((4,), 3.0), torch.full((4,), 4.0)]  # their size is 10
    for change, expected in (
        (0.0, ""),
        (0.24, ""),
        (0.26, "gradients are 0.052 of their size off torch's"),
        (math.nan, "gradients are nan of their size off torch's"),
    ):
        ours = [theirs[0] + change, theirs[1]]
        assert networks.what_is_off(ours, theirs, "gradients") == expected
    nothing = [torch.zeros(4)]
    assert networks.what_is_off(nothing, nothing, "outputs") == ""
    of_nothing = networks.what_is_off([torch.ones(4)], nothing, "outputs")
    assert of_nothing == "outputs are inf of their size off torch's"


@pytest.mark.parametrize("direction", [TRAINING, INFERENCE])
def test_a_comparison_leaves_no_trace(direction):
    case = Case("small csp mish", direction, False)
    module, batch = case.network.made_and_batch()
    copy = networks.Copy(case, MODES["fused remat"], module, batch)
    found = copy.sample()
    assert list(found) == (["outputs", "gradients"] if direction == TRAINING else ["outputs"])
    assert found["outputs"][0].shape == (4, 10)
    assert copy.module.training == (direction == TRAINING)
    assert copy.steps == 0
    assert not copy.optimizer.state
    for ours, first in zip(copy.module.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, first)
        assert ours.grad is None


def test_what_torch_computes_lives_until_all_are_compared(monkeypatch):
    alive, sample, in_rounds = [], networks.Copy.sample, networks.timing.in_rounds

    def recorded(self):
        found = sample(self)
        alive.extend(weakref.ref(each) for tensors in found.values() for each in tensors)
        return found

    def timed(turns, rounds):
        assert len(alive) == len(HERE) * (1 + 5)
        assert {each() for each in alive} == {None}
        in_rounds(turns, rounds)
        alive.clear()

    monkeypatch.setattr(networks.Copy, "sample", recorded)
    monkeypatch.setattr(networks.timing, "in_rounds", timed)
    assert not any(row["error"] for row in tiny_rows().values())
    assert not alive


def test_norms_have_met_the_batch():
    network, (images, _) = NETWORKS["small csp mish"].made_and_batch()
    seen = network[0][0](images[:4])  # of the first convolution
    norm = network[0][1]
    torch.testing.assert_close(norm.running_mean, seen.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.var(dim=(0, 2, 3)))
    assert norm.momentum == 0.1


def test_compiled_modes_are_not_compared(monkeypatch):
    monkeypatch.setattr(networks.Copy, "sample", raise_value_error)
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    rows = measure(Case("tiny", TRAINING, True), ["torch", "fused"], 1)
    assert not any(row["error"] for row in rows)


def test_a_loss_that_is_off_is_an_error(monkeypatch):
    def replace(module, report):
        torch.nn.init.normal_(module[-1].weight, std=50)

    monkeypatch.setattr(fused_act, "replace_activations", replace)
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    torchs, ours = measure(Case("tiny", TRAINING, True), ["torch", "fused"], 1)
    assert not torchs["error"]
    assert ours["error"].startswith("the loss is ")
    assert ours["ms"]  # what was measured is not hidden


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(6.0, False), (6.29, False), (5.71, False), (6.31, True), (5.69, True), (math.nan, True)],
)
def test_how_far_a_loss_may_be_off(loss, expected):
    assert networks.differs(loss, 6.0) is expected


@pytest.fixture
def seen(monkeypatch):
    """What forward of a block sees: the backend that is forced, and whether autocast is on."""
    found, forward = [], Block.forward

    def recorded(self, x):
        found.append((fused_act.dispatch.forced, torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    monkeypatch.setattr(Block, "forward", recorded)
    return found


def tiny_copy(direction, mode=MODES["torch"]):
    network = NETWORKS["tiny"]
    return networks.Copy(Case("tiny", direction, False), mode, network.made(), network.batch())


@pytest.mark.parametrize("direction", [TRAINING, INFERENCE])
def test_a_mode_has_the_backend_of_its_own(seen, direction):
    backend = fused_act.dispatch.BACKENDS["torch"]
    copy = tiny_copy(direction, Mode(is_ours=True, backend=backend.name))
    for what in (copy.go, copy.step, copy.step_bytes, copy.sample):
        what()
        assert seen
        assert {forced for forced, _ in seen} == {backend}
        seen.clear()
    tiny_copy(direction, MODES["fused"]).go()
    assert {forced for forced, _ in seen} == {None}


@pytest.mark.skipif(networks.ON_GPU, reason="autocast of a CPU")
@pytest.mark.parametrize("direction", [TRAINING, INFERENCE])
def test_steps_on_a_gpu_are_in_autocast_and_comparisons_are_not(monkeypatch, seen, direction):
    monkeypatch.setattr(networks, "ON_GPU", True)
    copy = tiny_copy(direction)
    copy.go()
    assert {is_on for _, is_on in seen} == {True}
    seen.clear()
    found = copy.sample()
    assert {is_on for _, is_on in seen} == {False}
    assert {each.dtype for tensors in found.values() for each in tensors} == {torch.float32}


def test_a_comparison_is_in_fp32_of_cudnn_too(monkeypatch):
    flags, convolution = [], nn.Conv2d.forward

    def recorded(self, x):
        flags.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))
        return convolution(self, x)

    module, batch = NETWORKS["small csp mish"].made_and_batch()
    copy = networks.Copy(Case("small csp mish", TRAINING, False), MODES["torch"], module, batch)
    monkeypatch.setattr(nn.Conv2d, "forward", recorded)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    copy.sample()
    assert set(flags) == {(False, True)}
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("direction", "fails_in_backward"), [(INFERENCE, False), (TRAINING, False), (TRAINING, True)]
)
def test_a_comparison_does_without_cudnn_where_it_has_no_algorithm(
    monkeypatch, direction, fails_in_backward
):
    """What fails halfway leaves no trace: gradients, wider norms, running statistics, eval."""
    module, batch = NETWORKS["small mobilenet_v2 relu6"].made_and_batch()
    case = Case("small mobilenet_v2 relu6", direction, False)
    copy = networks.Copy(case, MODES["torch"], module, batch)
    expected, tried = copy.sample(), []

    def refuse(*gradient):
        tried.append(torch.backends.cudnn.enabled)
        if torch.backends.cudnn.enabled:
            raise RuntimeError("GET was unable to find an engine to execute this computation")

    def refused(self, x):
        y = convolution(self, x)
        if not fails_in_backward:
            refuse()
        elif y.requires_grad:
            y.register_hook(refuse)
        return y

    convolution = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", refused)
    found = copy.sample()
    assert tried[0]
    assert not tried[-1]
    assert found.keys() == expected.keys()
    for what, tensors in expected.items():
        assert not networks.what_is_off(found[what], tensors, what)
    after, before = copy.module.state_dict(), module.state_dict()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert [each for each in copy.module.parameters() if each.grad is not None] == []
    assert copy.module.training == (direction == TRAINING)


@pytest.mark.parametrize("direction", [TRAINING, INFERENCE])
def test_the_clock_is_read_when_the_gpu_is_done(monkeypatch, direction):
    copy, events, outputs = tiny_copy(direction), [], networks.Copy.outputs

    def recorded(self, inputs):
        events.append("work")
        return outputs(self, inputs)

    def clock():
        events.append("clock")
        return 1.5 * events.count("clock")

    monkeypatch.setattr(networks.Copy, "outputs", recorded)
    monkeypatch.setattr(traces, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(networks, "time", types.SimpleNamespace(perf_counter=clock))
    assert copy.step()[0] == 1.5
    assert events == ["wait", "clock", "work", "wait", "clock"]


def test_memory_of_a_step_is_measured_without_gradients(monkeypatch):
    copy, before = tiny_copy(TRAINING), []

    def measured(call):
        before.extend(each.grad for each in copy.module.parameters())
        call()
        return 7

    monkeypatch.setattr(traces, "most_allocated", measured)
    copy.step()
    assert all(each.grad is not None for each in copy.module.parameters())
    assert copy.step_bytes() == 7
    assert before == [None] * 5


def test_what_a_mode_holds_has_its_buffers():
    copy = tiny_copy(INFERENCE)
    before = copy.held_bytes()
    copy.module.register_buffer("statistics", torch.zeros(100))
    copy.module.register_buffer("the_same", copy.module.statistics[:50])  # in one storage
    assert copy.held_bytes() == before + 400


def test_images_and_the_weights_for_them_are_channels_last(monkeypatch):
    shape = (6, 3, 8, 8)
    network = dataclasses.replace(NETWORKS["csp mish"], on_gpu=shape, on_cpu=shape)
    module, (images, targets) = network.made_and_batch()
    assert images.stride() == (3 * 8 * 8, 1, 3 * 8, 3)
    weights = [each for each in module.parameters() if each.dim() == 4]
    assert len(weights) > 10
    for each in (*weights, models.few((images, targets))[0]):
        assert each.is_contiguous(memory_format=torch.channels_last)
    assert module[0][0].weight.stride() == (27, 1, 9, 3)


def memory_event(microseconds, bytes_, device_type=0, index=0):
    args = {"Bytes": bytes_, "Device Type": device_type, "Ev Idx": index}
    return {"name": "[memory]", "ts": microseconds, "args": args}


def test_the_running_maximum_is_in_the_order_of_time():
    events = [
        {"name": "aten::empty"},
        memory_event(3.0, -5),
        memory_event(1.0, 4),
        memory_event(2.0, 5),
        memory_event(2.5, 100, device_type=1),
        memory_event(4.0, 3, index=8),
        memory_event(4.0, -2, index=7),
    ]
    assert traces.running_maximum(events) == 9
    assert traces.running_maximum(events[:1]) == 0


@pytest.mark.skipif(traces.ON_GPU, reason="a CPU's memory")
def test_the_most_that_a_call_allocates_on_a_cpu():
    before = torch.empty(9 * KIB, dtype=torch.uint8)

    def call():
        nonlocal before
        first = torch.empty(4 * KIB, dtype=torch.uint8)
        second = torch.empty(2 * KIB, dtype=torch.uint8)
        del first
        third = torch.empty(3 * KIB, dtype=torch.uint8)
        del second, third

    assert traces.most_allocated(call) == 6 * KIB


def test_memory_is_what_a_mode_holds_and_what_a_step_allocates():
    rows = tiny_rows()
    for row in rows.values():
        held = (row["peak_gb"] - row["step_gb"]) * networks.GIB
        # Twice 16 x 16 and 16, then 16 x 8, with momentum; a batch of vectors, and classes.
        assert held == 2 * 4 * (2 * (16 * 16 + 16) + 16 * 8) + 4 * 5 * 16 * 4 + 4 * 5 * 8
    # All activations of a block of 20 x 16, and more.
    assert rows["torch"]["step_gb"] * networks.GIB > 4 * 20 * 16 * 4


@pytest.mark.parametrize(
    ("device_ms", "expected"), [(1.0, "host"), (1.79, "host"), (1.81, "device"), (2.5, "device")]
)
def test_who_bounds_a_step_of_2_ms(device_ms, expected):
    assert networks.bound(device_ms, 2.0) == expected


def kernels(*microseconds):
    found = [{"cat": "kernel", "name": "k", "dur": each} for each in microseconds]
    return [
        *found,
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 10.0**6},
        {"ph": "M"},
    ]


def test_time_on_the_device_is_the_sum_of_what_runs_there():
    events = [
        *kernels(1.5, 2.0),
        {"cat": "gpu_memcpy", "name": "Memcpy", "dur": 4.0},
        {"cat": "gpu_memset", "name": "Memset", "dur": 8.0},
        {"cat": "gpu_user_annotation", "name": "step", "dur": 100.0},
    ]
    assert traces.microseconds_on_device(events) == 15.5


def test_device_time_is_that_of_one_call(monkeypatch):
    calls = []

    def trace(call, **options):
        assert options == {"activities": [ProfilerActivity.CUDA]}
        call()
        return kernels(*(1000.0 for _ in calls))

    monkeypatch.setattr(traces, "trace", trace)
    assert traces.device_ms(lambda: calls.append(1), 4) == 1.0
    assert len(calls) == 4


NO_PROFILE = {
    "nothing": [],
    "an error": RuntimeError("CUPTI_ERROR"),
    "a full disk": OSError(28, "No space left on device"),
    "no memory": torch.OutOfMemoryError("CUDA out of memory"),
}


@pytest.mark.parametrize("found", NO_PROFILE.values(), ids=NO_PROFILE)
def test_a_profiler_that_sees_no_gpu_is_one_line(monkeypatch, capsys, found):
    def trace(call, **options):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(traces, "trace", trace)
    traces.say_once.cache_clear()
    for _ in range(2):
        assert traces.device_ms(int, 2) is None
    reason = str(found) if isinstance(found, Exception) else "saw no work of the GPU"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("without device_ms and bound: ")
    assert line.endswith(reason)


def test_rows_of_a_gpu_say_who_bounds_a_step(monkeypatch):
    """All but the GPU itself: autocast, the profile, who computes."""
    trace, taken = traces.trace, fused_act.dispatch.BACKENDS["torch"]

    def fake(call, **options):
        if options["activities"] == [ProfilerActivity.CPU]:
            return trace(call, **options)
        call()
        return kernels(networks.TRACED * 7000.0)

    monkeypatch.setattr(traces, "trace", fake)
    monkeypatch.setattr(networks, "ON_GPU", True)
    monkeypatch.setattr(fused_act.dispatch, "automatic", lambda: taken)
    monkeypatch.setattr(networks, "bound", lambda device_ms, ms: f"{device_ms:g}, {ms:g}")
    rows = tiny_rows()
    for row in rows.values():
        assert not row["error"]
        assert row["device_ms"] == 7.0
        assert row["bound"] == f"7, {row['ms']:g}"
        assert row["dtype"] == "bf16"
    assert [rows[name]["backend"] for name in ("torch", "fused", "checkpoint")] == ["", "torch", ""]


@pytest.mark.parametrize("found", NO_PROFILE.values(), ids=NO_PROFILE)
def test_without_a_profile_what_was_timed_stays(monkeypatch, found):
    trace = traces.trace

    def fake(call, **options):
        if options["activities"] == [ProfilerActivity.CPU]:
            return trace(call, **options)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(traces, "trace", fake)
    monkeypatch.setattr(networks.Copy, "device_ms", lambda self: traces.device_ms(self.go, 2))
    traces.say_once.cache_clear()
    for row in tiny_rows().values():
        assert not row["error"]
        assert not row["skipped"]
        assert row["samples"] == 2
        assert row["ms"] > 0
        assert row["step_gb"] > 0
        assert row["device_ms"] == row["bound"] == ""


def test_triton_takes_part_where_auto_takes_another(monkeypatch):
    mode, backends = MODES["fused triton"], fused_act.dispatch.BACKENDS
    if not networks.ON_GPU:
        assert mode.unavailable() == "no GPU is here"
    monkeypatch.setattr(networks, "ON_GPU", True)
    there = dataclasses.replace(backends["triton"], unavailable=lambda: None)
    missing = dataclasses.replace(backends["triton"], unavailable=lambda: "no Triton is here")
    for triton, taken, expected in (
        (there, "cuda", None),
        (there, "triton", "it is the backend that auto takes"),
        (missing, "cuda", "no Triton is here"),
    ):
        monkeypatch.setitem(backends, "triton", triton)
        monkeypatch.setattr(fused_act.dispatch, "automatic", lambda taken=taken: backends[taken])
        assert mode.unavailable() == expected


class Failing:
    """The block of a mode that raises in one of its steps."""

    def __init__(self, error, step):
        self.error, self.steps = error, itertools.count()
        self.step = step

    def __call__(self):
        if next(self.steps) == self.step:
            raise self.error
        return contextlib.nullcontext()


COMPARED = 2  # runs of a mode before its first step, in training


# In the first step, in that of the memory, and in the second round.
@pytest.mark.parametrize("step", [COMPARED + networks.WARM_UP + i for i in (-3, 0, 2)])
def test_a_mode_that_fails_lets_the_others_go_on(monkeypatch, command, step):
    failing = Failing(ValueError("first line\nsecond line"), step)
    monkeypatch.setitem(MODES, "fused remat", Mode(is_ours=True, block=failing))
    exit_status, rows = command()
    assert exit_status == 1
    for row in rows:
        failed = row["mode"] == "fused remat"
        assert row["error"] == ("ValueError: first line" if failed else "")
        assert row["samples"] == ("0" if failed else "2")
        assert bool(row["ms"]) is bool(row["step_gb"]) is bool(row["loss"]) is not failed


@pytest.mark.parametrize("run", range(COMPARED))
def test_a_mode_that_cannot_be_compared_is_timed(monkeypatch, run):
    failing = Failing(ValueError("no engine"), run)
    monkeypatch.setitem(MODES, "fused remat", Mode(is_ours=True, block=failing))
    rows = tiny_rows()
    assert rows["fused remat"].pop("error") == "not compared: ValueError: no engine"
    assert not any(row.get("error") for row in rows.values())
    assert {row["samples"] for row in rows.values()} == {2}
    assert len({row["loss"] for row in rows.values()}) == 1  # in training, as the others


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")],
    ids=["GPU", "CPU"],
)
def test_out_of_memory_in_one_mode(monkeypatch, command, capsys, error):
    monkeypatch.setitem(MODES, "fused", Mode(is_ours=True, block=Failing(error, COMPARED + 5)))
    exit_status, rows = command("--modes", "torch", "fused")
    assert exit_status == 0
    torchs, ours, of_inference = rows
    assert [row["skipped"] for row in rows] == ["", "out of memory", ""]
    assert [row["samples"] for row in rows] == ["2", "0", "2"]
    assert (torchs["mode"], ours["mode"], of_inference["mode"]) == ("torch", "fused", "torch")
    assert "tiny, training, fused: skipped: out of memory" in capsys.readouterr().out


def test_what_is_out_of_memory_is_freed_at_once(monkeypatch):
    modules, prepare = [], networks.Copy.__init__

    def recorded(self, *arguments):
        prepare(self, *arguments)
        modules.append(weakref.ref(self.module))

    def step(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(networks.Copy, "__init__", recorded)
    monkeypatch.setattr(networks.Copy, "step", step)
    run, network = networks.Run("torch"), NETWORKS["tiny"]
    case = Case("tiny", TRAINING, False)
    run.attempt(partial(run.prepare, case, network.made(), network.batch(), {}))
    assert run.skipped == "out of memory"
    assert modules[0]() is None


def test_a_network_that_cannot_be_made_fails_in_all_modes(monkeypatch):
    broken = dataclasses.replace(NETWORKS["tiny"], build=lambda: raise_value_error(None))
    monkeypatch.setitem(NETWORKS, "tiny", broken)
    assert {row["error"] for row in tiny_rows().values()} == {"ValueError: first line"}


def test_a_checkpoint_is_around_every_block_but_not_within_one():
    model = nn.Sequential(Block(), nn.Sequential(Block()))
    model[0].layers.append(Block())
    assert networks.checkpoint_blocks(model, "Block") == 2
    wrapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert wrapped == ["0", "1.0"]


def test_a_network_without_its_blocks_is_an_error(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", dataclasses.replace(NETWORKS["tiny"], block="Blok"))
    rows = tiny_rows(names=["torch", "checkpoint"])
    assert rows["checkpoint"]["error"] == "ValueError: tiny has no block of a class Blok"
    assert not rows["torch"]["error"]


def test_the_columns_are_those_of_the_first_results_and_more(command):
    exit_status, rows = command()
    assert exit_status == 0
    expected = {*OLDER_COLUMNS, *environment.environment(), "sm_clock_mhz", "memory_clock_mhz"}
    assert expected <= rows[0].keys()
    modes = [(row["direction"], row["mode"]) for row in rows]
    assert modes == [
        *((TRAINING, name) for name in HERE),
        *((INFERENCE, name) for name in ("torch", "fused")),
    ]
    for row in rows:
        assert all(row[column] for column in OLDER_COLUMNS)
        assert 0 < float(row["min"]) <= float(row["q20"]) <= float(row["ms"]) <= float(row["q80"])


def test_networks_come_one_after_another_in_training_and_inference(monkeypatch, command):
    monkeypatch.setitem(NETWORKS, "tinier", NETWORKS["tiny"])
    _, rows = command("--modes", "torch", "--networks", "tinier", "tiny")
    assert [(row["net"], row["direction"]) for row in rows] == [
        (net, direction) for net in ("tinier", "tiny") for direction in (TRAINING, INFERENCE)
    ]


def test_the_network_that_the_host_bounds_comes_before_any_profile():
    assert next(iter(NETWORKS)) == "mobilenet_v2 bs8"
    if networks.ON_GPU:
        assert models.DEFAULT[0] == models.QUICK[0] == "mobilenet_v2 bs8"


def test_modes_are_profiled_when_all_were_timed(monkeypatch):
    events, step = [], networks.Copy.step
    monkeypatch.setattr(networks.Copy, "step", lambda self: events.append("step") or step(self))
    monkeypatch.setattr(networks.Copy, "device_ms", lambda self: events.append("profile"))
    tiny_rows()
    profiles = len(HERE)
    assert events[-profiles:] == ["profile"] * profiles
    assert set(events[:-profiles]) == {"step"}


@pytest.mark.full
def test_what_a_checkpoint_saves():
    case = Case("small swiglu silu", TRAINING, False)
    torchs, checkpoints = measure(case, ["torch", "checkpoint"], 1)
    assert checkpoints["step_gb"] < 0.6 * torchs["step_gb"]


@pytest.mark.full
def test_quick(tmp_path, capsys):
    assert status("networks", "--quick", "--results", tmp_path) == 0
    rows = read_csv(tmp_path / "networks.csv")
    assert list(dict.fromkeys(row["net"] for row in rows)) == models.SMALL
    assert rows[0].keys() >= set(OLDER_COLUMNS)
    assert not any(row["skipped"] or row["error"] for row in rows)
    losses = {(row["net"], row["direction"], row["loss"]) for row in rows}
    assert len(losses) == 2 * len(models.SMALL)
    output = capsys.readouterr().out
    assert "NO GPU" in output
    assert "small csp mish, training, 4" in output


@pytest.mark.full
def test_compiled(tmp_path):
    arguments = ("--networks", "small swiglu silu", "--rounds", 2, "--results", tmp_path)
    assert status("networks", "--compiled", *arguments) == 0
    rows = read_csv(tmp_path / "networks_compiled.csv")
    assert [(row["direction"], row["mode"], row["backend"]) for row in rows] == [
        (direction, mode, backend)
        for direction in (TRAINING, INFERENCE)
        for mode, backend in (("torch", ""), ("fused", "inductor"))
    ]
    assert all(float(row["ms"]) > 0 for row in rows)


def test_what_is_late_gets_rows_that_say_so(command, capsys):
    exit_status, rows = command("--time-limit", "1e-9")
    assert exit_status == 0
    assert {row["skipped"] for row in rows} == {"over the time limit"}
    assert {row["ms"] for row in rows} == {""}
    assert len(rows) == 7
    assert "tiny, inference, torch: skipped: over the time limit" in capsys.readouterr().out


def test_without_its_package_a_network_is_one_line(monkeypatch, command, capsys):
    for package in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    absent = ("resnet50 mish", "cspdarknet53 mish")
    exit_status, rows = command("--networks", "tiny", *absent, "--modes", "torch")
    assert exit_status == 0
    assert {row["net"] for row in rows} == {"tiny"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("without ")]
    assert len(lines) == 2
    assert lines[0].startswith("without resnet50 mish: torchvision is needed: ")
    assert lines[1].startswith("without cspdarknet53 mish: timm is needed: ")

    assert command("--networks", *absent)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "none of the networks can run here: resnet50 mish, cspdarknet53 mish"


@pytest.mark.skipif(networks.ON_GPU, reason="Triton may run here")
def test_a_mode_that_cannot_run_is_one_line(command, capsys):
    exit_status, rows = command("--modes", "fused", "fused triton")
    assert exit_status == 0
    assert {row["mode"] for row in rows} == {"fused"}
    assert "without fused triton: no GPU is here\n" in capsys.readouterr().out
    assert command("--modes", "fused triton")[0] == 2
    assert capsys.readouterr().err == "none of the modes can run here: fused triton\n"


@pytest.mark.parametrize(
    ("option", "name"), [("--networks", "alexnet"), ("--modes", "unfused"), ("--rounds", "0")]
)
def test_a_name_that_is_none_is_refused(command, capsys, option, name):
    assert command(option, name)[0] == 2
    line = capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]
    choices = {"--networks": NETWORKS, "--modes": MODES}.get(option)
    what = f"one of {', '.join(choices)}" if choices else "a positive whole number"
    assert line == f"argument {option}: expected {what}, got {name!r}"


def test_compiled_networks_have_no_other_modes(command, capsys):
    assert command("--compiled", "--modes", "torch", "fused remat", "checkpoint")[0] == 2
    assert capsys.readouterr().err == (
        "--compiled takes the modes torch, fused, got fused remat, checkpoint\n"
    )


def test_without_a_gpu_the_small_networks_run():
    assert parse(["networks"]).networks is None
    if not networks.ON_GPU:
        assert models.DEFAULT == models.QUICK == models.COMPILED == models.SMALL
    assert len(models.SMALL) == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "all"),
        (["--compiled"], "large"),
        (["--quick"], "quick"),
        (["--quick", "--compiled"], "quick"),
        (["--compiled", "--networks", "tiny"], "tiny"),
    ],
)
def test_which_networks_are_measured(monkeypatch, arguments, expected):
    names = ("all", "large", "quick")
    for default, name in zip(("DEFAULT", "COMPILED", "QUICK"), names, strict=True):
        monkeypatch.setattr(models, default, [name])
        monkeypatch.setitem(NETWORKS, name, NETWORKS["tiny"])
    assert networks.chosen_networks(parse(["networks", *arguments])) == [expected]


def test_a_time_limit_that_is_none_is_refused(command, capsys):
    assert command("--time-limit", "-1")[0] == 2
    assert "argument --time-limit: expected a positive number" in capsys.readouterr().err


@pytest.mark.parametrize(("is_compiled", "expected"), [(False, 90.0), (True, 240.0)])
def test_the_time_limit_of_a_gpu(monkeypatch, is_compiled, expected):
    arguments = parse(["networks", *(["--compiled"] if is_compiled else [])])
    monkeypatch.setattr(networks, "ON_GPU", False)
    assert networks.time_limit(arguments) == math.inf
    monkeypatch.setattr(networks, "ON_GPU", True)
    assert networks.time_limit(arguments) == expected


def test_what_is_beside_torch():
    row = {"net": "mobilenet_v2 relu6 bs8", "mode": "torch", "ms": "4", "min": "2", "step_gib": "8"}
    rows = [
        row,
        row | {"mode": "fused", "ms": "6", "min": "1", "step_gib": "2"},
        row | {"mode": "fused notinplace+remat norm", "ms": "8"},
        row | {"mode": "checkpoint", "ms": "", "min": "", "step_gib": ""},
        row | {"mode": "fused", "direction": INFERENCE, "ms": "6"},
    ]
    net = "mobilenet_v2 bs8"
    assert beside_torch([networks.of_today(each) for each in rows]) == {
        (net, TRAINING, "torch"): (1, 1, 1),
        (net, TRAINING, "fused"): (1.5, 0.25, 0.5),
        (net, TRAINING, "fused remat norm"): (2, 1, 1),
    }
    newer = {
        "net": "a",
        "direction": INFERENCE,
        "mode": "torch",
        "ms": 2.0,
        "min": 1,
        "step_gb": "",
    }
    (found,) = beside_torch([networks.of_today(newer)]).values()
    assert found.time == 1
    assert math.isnan(found.memory)


def test_losses_are_printed_like_gains(capsys):
    row = tiny_rows(names=["torch"])["torch"] | {"ms": 2.0, "min": 1.0}
    slower = row | {"mode": "fused", "backend": "cuda", "ms": 3.0, "min": 0.5}
    networks.print_results([row, slower])
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line.split() for line in lines if "fused (cuda)" in line)
    assert line[:6] == ["fused", "(cuda)", "3.00", "1.50", "0.50", "0.50"]
    assert sum("tiny, training, 4" in line for line in lines) == 1


def all_modes(monkeypatch, name, shape):
    """Rows of training and inference of one of the large networks, on a batch that is small."""
    small = dataclasses.replace(NETWORKS[name], on_gpu=shape, on_cpu=shape)
    monkeypatch.setitem(NETWORKS, name, small)
    for direction, names in ((TRAINING, HERE), (INFERENCE, ["torch", "fused"])):
        for row in measure(Case(name, direction, False), names, 1):
            yield row["mode"], row


@pytest.mark.zoo
def test_llama(monkeypatch, transformers):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 8192}
    monkeypatch.setattr(models, "LLAMA", models.LLAMA | sizes)
    for mode, row in all_modes(monkeypatch, "llama 4x2048 silu", (2, 16)):
        assert not row["error"]
        assert row["replaced"] == (4 if mode.startswith("fused") else 0)
        assert row["unit"] == "tokens"
        assert row["per_second"] == pytest.approx(32_000 / row["ms"])


REPLACED = {
    "mobilenet_v2 relu6": 35,
    "mobilenet_v2 bs8": 35,
    "resnet50 mish": 17,
    "efficientnet_b0 silu": 65,
    "cspdarknet53 mish": 67,
}


@pytest.mark.zoo
@pytest.mark.timm
@pytest.mark.parametrize("name", REPLACED)
def test_networks_of_torchvision_and_timm(monkeypatch, timm, name):
    assert NETWORKS[name].unavailable() is None
    losses = {TRAINING: set(), INFERENCE: set()}
    for mode, row in all_modes(monkeypatch, name, (2, 3, 64, 64)):
        assert not row["error"]
        assert row["replaced"] == (REPLACED[name] if mode.startswith("fused") else 0)
        losses[row["direction"]].add(row["loss"])
        if mode == "checkpoint":
            assert row["step_gb"] > 0
    assert [len(found) for found in losses.values()] == [1, 1]


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    arguments = ("--results", tmp_path, "--rounds", 2, "--networks", *models.SMALL)
    assert status("networks", *arguments) == 0
    rows = read_csv(tmp_path / "networks.csv")
    assert not [row for row in rows if row["error"] or row["skipped"]]
    assert {row["backend"] for row in rows if row["mode"] == "fused"} <= {"cuda", "triton"}
    for row in rows:
        assert float(row["step_gb"]) > 0
        if row["device_ms"]:  # CUPTI may not be allowed here
            assert float(row["device_ms"]) > 0
            assert row["bound"] in ("host", "device")
        else:
            assert not row["bound"]
