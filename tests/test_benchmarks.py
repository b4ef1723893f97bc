"""The comparison scripts: what they measure and skip, and what an early end leaves behind."""

import importlib
import inspect
import itertools
import runpy
import signal
import sys
import types

import pytest
import torch

from benchmarks import compare_memory, compare_speed, environment, providers, timing
from benchmarks.compare_speed import Method, Workload
from benchmarks.providers import DTYPES, PROVIDERS, Provider
from fused_act.activations import FAMILIES, ROWS
from fused_act.backends.triton import INTERPRET

ELEMENTWISE = FAMILIES["elementwise"]

read = environment.read_csv
ATEN = next(provider for provider in PROVIDERS if provider.name == "aten")


def provider(name, function, **fields):
    return Provider(name, lambda activation, inplace: function, **fields)


def rows_then(*values, error):
    yield from ({"value": value} for value in values)
    raise error


# Rows and exit status


def test_rows_are_in_the_file_as_they_come(tmp_path):
    path = tmp_path / "new" / "speed.csv"
    partial = path.with_name("speed.partial.csv")

    def rows():
        for value in ("1", "2"):
            yield {"value": value}
            assert [row["value"] for row in read(partial)][-1] == value
        yield {"value": "3", "more": "4"}
        assert [row["more"] for row in read(partial)] == ["", "", "4"]

    returned = environment.write_csv(path, rows())
    assert [row["value"] for row in returned] == ["1", "2", "3"]
    assert [row["value"] for row in read(path)] == ["1", "2", "3"]
    assert read(path)[0]["torch"] == torch.__version__
    assert not partial.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()], ids=repr)
def test_an_early_end_keeps_its_rows_and_the_older_file(tmp_path, capsys, error):
    path, partial = tmp_path / "speed.csv", tmp_path / "speed.partial.csv"
    environment.write_csv(path, [{"value": "older"}])
    with pytest.raises(type(error)):
        environment.write_csv(path, rows_then("1", "2", error=error))
    assert [row["value"] for row in read(path)] == ["older"]
    assert [row["value"] for row in read(partial)] == ["1", "2"]
    assert f"2 rows in {partial}" in capsys.readouterr().err

    with pytest.raises(type(error)):  # before its first row
        environment.write_csv(path, rows_then(error=error))
    assert [row["value"] for row in read(partial)] == ["1", "2"]

    environment.write_csv(path, [{"value": "newer"}])
    assert [row["value"] for row in read(path)] == ["newer"]
    assert "in place of an older file" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        environment.write_csv(tmp_path / "file" / "speed.csv", rows_then(error=AssertionError()))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("cannot write speed.csv (")
    assert message.count("\n") == 1
    assert str(tmp_path / "file") in message


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, as in a shell; a job in the background may have begun with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("main", "status"),
    [
        (lambda: [{"error": ""}, {}], 0),
        (lambda: [{"error": ""}, {"error": "ValueError"}], 1),
        (lambda: environment.refuse("no"), 2),
        (lambda: signal.raise_signal(signal.SIGINT), 130),
    ],
    ids=["done", "failed", "refused", "interrupted"],
)
def test_exit_status(main, status):
    with pytest.raises(SystemExit) as ended:
        environment.run(main)
    assert ended.value.code == status


# Where numbers come from


def test_clocks_are_those_of_the_gpu_in_use(monkeypatch):
    commands = []

    def output(*command):
        commands.append(command)
        return "1980, [N/A]"

    monkeypatch.setattr(environment, "on_gpu", lambda: True)
    monkeypatch.setattr(environment, "output", output)
    properties = types.SimpleNamespace(uuid="1-2-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert environment.clocks() == {"sm_clock_mhz": "1980", "memory_clock_mhz": ""}
    assert "--id=GPU-1-2-3" in commands[0]
    assert "--query-gpu=clocks.current.sm,clocks.current.memory" in commands[0]

    monkeypatch.setattr(environment, "output", lambda *command: "")  # no nvidia-smi
    assert environment.clocks() == {"sm_clock_mhz": "", "memory_clock_mhz": ""}


def test_a_provider_that_does_not_import_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "flag_gems.py").write_text("raise RuntimeError('no driver\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    names = {one.name for one in providers.available()}
    assert "flag_gems" not in names
    assert "aten" in names
    assert "without flag_gems: RuntimeError: no driver\n" in capsys.readouterr().out


def gradient(activation, grad_output, x):
    """What torch's own op makes of `grad_output`."""
    x = x.clone().requires_grad_()
    y = activation.torch_forward(x, *providers.parameters(activation), inplace=False)
    return torch.autograd.grad(y, x, grad_output)[0]


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
        if compare_speed.offers(kernels, direction):
            offered.add(f"{activation.name} {direction}")
            call = compare_speed.kernel_call(kernels, parameters, direction, x, grad_output)
            if direction == "forward":
                expected = activation.torch_forward(x, *parameters, inplace=False)
            else:
                expected = gradient(activation, grad_output, x)
            assert torch.equal(call(), expected)
    assert offered == {"swish forward", "swish backward", "relu6 forward"}


# Times


def test_all_take_a_turn_in_each_round_in_another_order():
    order = []
    timing.in_rounds([lambda name=name: order.append(name) for name in "abcde"], 4)
    rounds = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == list("abcde") for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4


def test_cpu_turns_last_as_long_as_asked_and_tell_the_time_of_one_run(monkeypatch):
    numbers = []

    class Timer:
        def __init__(self, statement, globals):
            assert eval(statement, globals) == "called"

        def timeit(self, number):
            numbers.append(number)
            return types.SimpleNamespace(median=0.002)

    monkeypatch.setattr(timing.benchmark, "Timer", Timer)
    turn = timing.cpu_turn(lambda: "called", 0.03)
    assert turn() == [0.002]
    assert numbers[-1] == 15


@pytest.mark.parametrize(
    ("make", "name"), [(timing.gpu_turn, "do_bench"), (timing.graph_turn, "do_bench_cudagraph")]
)
def test_gpu_turns_are_tritons(monkeypatch, make, name):
    testing = pytest.importorskip("triton.testing")
    signature = inspect.signature(getattr(testing, name))

    def bench(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        assert arguments["fn"] is print
        assert arguments["return_mode"] == "all"
        assert arguments["rep"] == pytest.approx(30 if name == "do_bench" else 3)  # of ten replays
        return [2.0, 3.0]  # ms

    monkeypatch.setattr(testing, name, bench)
    assert make(print, 0.03)() == [0.002, 0.003]


class Clock:
    """Says that a call took as long as the function that was called says."""

    def __init__(self):
        self.seconds = 0.0

    def turn(self, call, seconds):
        def turn():
            self.seconds = 0.001  # of those who say nothing: copies
            call()
            return [self.seconds]

        return turn

    def taking(self, *seconds):
        """A function of x whose calls take so long, but for the first, which prepares."""
        following = itertools.chain([0.0], itertools.cycle(seconds))

        def function(x):
            self.seconds = next(following)
            return x.clone()

        return function


CLOCK = Clock()
SMALL = Workload(ROWS["mish"], "fp32", 2**10, "contiguous")


def measure(functions, workload=SMALL, launches=("call",), direction="forward", **options):
    """The rows of one direction by provider, the clock replaced."""
    compared = [provider(name, function) for name, function in functions.items()]
    method = Method(dict.fromkeys(launches, CLOCK.turn), 3, 0.001)
    rows = compare_speed.measure(workload, compared, method, **options)
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


def raise_value_error(x):
    raise ValueError("first line\nsecond line")


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

    monkeypatch.setitem(compare_speed.LAYOUTS, "contiguous", contiguous)
    rows = measure({"one": CLOCK.taking(0.002)})
    assert rows["one"]["skipped"] == "out of memory"


def test_small_tensors_run_in_graphs_too_but_not_backward_through_autograd():
    method = Method(dict.fromkeys(("call", "graph"), CLOCK.turn), 1, 0.001)
    found = {
        numel: {
            (row["provider"], row["api"], row["direction"])
            for row in compare_speed.measure(
                Workload(ROWS["mish"], "fp32", numel, "contiguous"), [ATEN], method
            )
            if row["launch"] == "graph"
        }
        for numel in (compare_speed.SMALL, 2 * compare_speed.SMALL)
    }
    directions = ("forward", "backward", "forward+backward")
    expected = {
        *((name, "kernel", direction) for name in ("copy", "aten") for direction in directions),
        *(("aten", "public", direction) for direction in directions if direction != "backward"),
    }
    assert found == {compare_speed.SMALL: expected, 2 * compare_speed.SMALL: set()}


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda activation: activation.name)
def test_kernels_and_public_functions_compute_what_they_are_timed_for(activation):
    x, grad_output = torch.randn(2, 64)
    parameters = providers.parameters(activation)
    y = activation.torch_forward(x, *parameters, inplace=False)
    grad_input = gradient(activation, grad_output, x)
    kernels = providers.aten_kernels(activation)
    calls = {
        direction: compare_speed.kernel_call(kernels, parameters, direction, x, grad_output)
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
        call = compare_speed.public_call(function, direction, x, grad_output)
        found = call()
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found.detach(), expected)
        assert found.requires_grad == (direction == "forward")


# What is measured


@pytest.mark.parametrize("layout", compare_speed.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    workload = Workload(ROWS["relu6"], dtype, 2**10, layout)
    x = workload.tensor("cpu")
    assert (x.dtype, x.numel()) == (DTYPES[dtype], workload.numel())
    assert x.float().std() > 0.5  # all of it is drawn
    assert x.is_contiguous() == (layout != "channels_last")
    assert layout != "channels_last" or x.is_contiguous(memory_format=torch.channels_last)
    assert (x.numel() % 16 != 0) == (layout == "odd")
    assert (x.data_ptr() % 16 != 0) == (layout == "misaligned")


def test_grid(monkeypatch):
    def grid(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare_speed", *arguments])
        return compare_speed.grid(compare_speed.parse_arguments())

    monkeypatch.setattr(compare_speed, "ON_GPU", True)
    default = grid()
    assert len(default) == len(set(default)) == 11
    assert default[:3] == [
        ("bf16", 2**27, "contiguous"), ("fp16", 2**27, "contiguous"), ("fp32", 2**26, "contiguous"),
    ]  # fmt: skip
    assert {numel for dtype, numel, _ in default if dtype == "bf16"} >= {2**10, 2**30}
    assert {layout for _, _, layout in default} == set(compare_speed.LAYOUTS)
    assert len(grid("--quick")) == 2
    assert len(grid("--full")) == 21 * len(DTYPES) * len(compare_speed.LAYOUTS)
    assert grid("--sizes", "2^20", "1000", "--dtypes", "fp32") == [
        ("fp32", 2**20, "contiguous"), ("fp32", 1000, "contiguous"),
    ]  # fmt: skip
    assert set(grid("--dtypes", "fp16", "--layouts", "odd")) == {
        ("fp16", numel, "odd") for numel in (2**10, 2**14, 2**18, 2**22, 2**27, 2**30)
    }
    monkeypatch.setattr(compare_speed, "ON_GPU", False)
    assert max(numel for _, numel, _ in grid()) == 2**22
    assert grid("--quick") == [("bf16", 2**20, "contiguous")]


@pytest.mark.parametrize("text", ["x", "2^", "0", "-1", "2^60", "1e6", "2^2^2", "9^999999999"])
def test_a_size_that_is_none_is_refused(monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["compare_speed", f"--sizes={text}"])
    with pytest.raises(SystemExit) as ended:
        compare_speed.parse_arguments()
    assert ended.value.code == 2
    assert "expected 2^8 to 2^40" in capsys.readouterr().err


# The whole script


@pytest.fixture
def compare(monkeypatch, tmp_path, one_thread):
    """Runs the script, its clock replaced; returns its exit status."""
    monkeypatch.setattr(compare_speed, "ON_GPU", False)
    monkeypatch.setattr(timing, "cpu_turn", CLOCK.turn)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["speed", "--results", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            environment.run(compare_speed.main)
        return ended.value.code

    return run


ALL_EAGER = ("--sizes", "2^10", "--dtypes", "fp32", "--providers", "aten", "naive", "fallback")


@pytest.mark.parametrize("without", [(), ("tabulate", "tqdm")], ids=["", "no tabulate, no tqdm"])
def test_the_script_says_what_it_compared(monkeypatch, compare, tmp_path, capsys, without):
    for package in without:
        monkeypatch.setitem(sys.modules, package, None)
    assert compare(*ALL_EAGER) == 0
    rows = read(tmp_path / "speed.csv")
    assert {row["provider"] for row in rows} == {"copy", "aten", "naive", "fallback"}
    assert {row["activation"] for row in rows} == {"mish", "swish", "relu6"}
    assert all(float(row["median"]) > 0 for row in rows)
    output = capsys.readouterr().out
    for text in ("NO GPU", compare_speed.BYTES, "relu6 inference fp32 2^10", "slower in"):
        assert text in output


def test_what_is_too_large_or_too_late_gets_rows_that_say_so(compare, tmp_path, capsys):
    assert compare(*ALL_EAGER[2:], "--sizes", "2^40") == 0
    (skipped,) = {row["skipped"] for row in read(tmp_path / "speed.csv")}
    assert skipped.startswith("over the cap: 24 such tensors take 98304 of")
    assert f"rows skipped: {skipped}" in capsys.readouterr().out

    assert compare(*ALL_EAGER, "--time-limit", "-1") == 0
    (skipped,) = {row["skipped"] for row in read(tmp_path / "speed.csv")}
    assert skipped == "over the time limit"


def test_a_failure_ends_with_status_1_after_the_others(monkeypatch, compare, tmp_path):
    monkeypatch.setitem(providers.NAIVE, "mish", raise_value_error)
    assert compare(*ALL_EAGER) == 1
    rows = read(tmp_path / "speed.csv")
    failed = [row for row in rows if row["error"]]
    assert {(row["provider"], row["activation"]) for row in failed} == {("naive", "mish")}
    assert len(failed) == 3 < len(rows)


def test_no_provider_that_can_run_is_refused(compare, capsys):
    assert compare("--providers", "flag_gems") == 2
    assert "none of flag_gems can run here" in capsys.readouterr().err


def test_without_triton_a_gpu_is_not_timed(monkeypatch, compare, capsys):
    monkeypatch.setattr(compare_speed, "ON_GPU", True)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compare() == 2
    assert "triton" in capsys.readouterr().err


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_what_was_measured(monkeypatch, compare, tmp_path):
    assert compare(*ALL_EAGER) == 0
    older = read(tmp_path / "speed.csv")
    clocks = iter([{"sm_clock_mhz": ""}])  # which are read at the end of each direction

    def interrupted():
        return next(clocks, None) or signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(environment, "clocks", interrupted)
    assert compare(*ALL_EAGER) == 130
    assert read(tmp_path / "speed.csv") == older
    kept = read(tmp_path / "speed.partial.csv")
    assert {row["direction"] for row in kept} == {"forward"}
    assert len(kept) == 5  # a copy; aten's kernel; three public functions


def test_a_gpu_is_timed_as_a_gpu(monkeypatch, compare, tmp_path, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(compare_speed, "ON_GPU", True)
    monkeypatch.setattr(timing, "gpu_turn", CLOCK.turn)
    monkeypatch.setattr(timing, "graph_turn", CLOCK.turn)
    properties = types.SimpleNamespace(total_memory=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert compare("--sizes", "2^10", "2^20", *ALL_EAGER[2:]) == 0
    assert "NO GPU" not in capsys.readouterr().out
    rows = read(tmp_path / "speed.csv")
    assert {row["provider"] for row in rows} == {"copy", "aten", "naive"}
    assert {row["launch"] for row in rows if row["numel"] == "1024"} == {"call", "graph"}
    assert {bool(row["skipped"]) for row in rows if row["numel"] == "1024"} == {False}
    assert {bool(row["skipped"]) for row in rows if row["numel"] != "1024"} == {True}


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_triton_in_the_interpreter(compare, tmp_path):
    layouts = ("--layouts", *compare_speed.LAYOUTS)
    assert compare("--sizes", "2^10", "--dtypes", "bf16", "--providers", "triton", *layouts) == 0
    rows = read(tmp_path / "speed.csv")
    assert {row["provider"] for row in rows} == {"copy", "triton"}
    assert {row["api"] for row in rows if row["provider"] == "triton"} == {"kernel", "public"}
    bytes_ = {
        row["direction"]: int(row["bytes"])
        for row in rows
        if (row["provider"], row["activation"], row["numel"]) == ("triton", "relu6", "1024")
    }
    assert bytes_ == {
        "inference": 4096, "forward": 4224, "backward": 4224, "forward+backward": 8448,
    }  # fmt: skip


@pytest.mark.gpu
def test_the_script_on_a_gpu(monkeypatch, tmp_path):
    arguments = ("--results", str(tmp_path), "--sizes", "2^12", "--layouts", *compare_speed.LAYOUTS)
    monkeypatch.setattr(sys, "argv", ["speed", *arguments, "--dtypes", "bf16"])
    rows = compare_speed.main()
    assert not [row["error"] for row in rows if row["error"]]
    assert {row["launch"] for row in rows} == {"call", "graph"}
    assert all(row["samples"] for row in rows)


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
    ((_, best, ours),) = compare_speed.verdicts(rows)
    assert best["provider"] == "aten"
    assert {name: str(one).strip() for name, one in ours.items()} == {"triton": expected}


# Pictures


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    return importlib.import_module("benchmarks.plot_results")


def speed_row(provider, median, **fields):
    """A row of speed.csv whose copy takes 1 ms."""
    row = {"provider": provider, "activation": "mish", "dtype": "bf16", "direction": "forward"}
    row |= {"layout": "contiguous", "numel": 2**20, "api": "public", "launch": "call"}
    row |= {
        "median": median,
        "q20": 0.8 * median,
        "q80": 2 * median,
        "share_of_copy": 1 / median,
    }
    row |= {"gpu": "", "cpu": "EPYC", "torch": "2", "commit": "c"} | fields
    return {column: str(value) for column, value in row.items()}


def test_picture_by_size(plots):
    rows = [speed_row("aten", 5.0, numel=numel) for numel in (2**22, 2**20)]
    rows += [speed_row("cuda", 2.0, numel=2**20), speed_row("cuda", 1.25, numel=2**22)]
    rows += [
        speed_row("cuda", 9.0, layout="odd"), speed_row("cuda", 9.0, api="kernel"),
        speed_row("cuda", 9.0, launch="graph"), speed_row("cuda", 9.0, dtype="fp32"),
        speed_row("naive", 9.0, share_of_copy=""),
    ]  # fmt: skip
    figure = plots.speed_by_size(rows)
    axes = figure.axes[0]
    assert axes.get_title() == "mish forward"
    assert "NO GPU: EPYC" in figure.get_suptitle()
    assert "commit c" in figure.get_suptitle()
    assert axes.get_xscale() == "log"
    lines = {line.get_label(): line for line in axes.get_lines() if line.get_marker() != "None"}
    assert list(lines) == ["cuda", "aten"]
    assert list(lines["cuda"].get_xdata()) == [2**20, 2**22]
    assert list(lines["cuda"].get_ydata()) == pytest.approx([50, 80])
    band = axes.collections[0].get_datalim(axes.transData)
    assert (band.y0, band.y1) == pytest.approx((25, 100))  # of 4 ms, and of 1 ms
    assert list(lines["aten"].get_xdata()) == [2**20, 2**22]
    with pytest.raises(plots.NothingToDraw, match="one size"):
        plots.speed_by_size(rows[:1])


def test_picture_by_dtype(plots):
    rows = [
        speed_row("cuda", 2.0, dtype="bf16", numel=2**27),
        speed_row("cuda", 2.0, dtype="fp32", numel=2**26),
        speed_row("aten", 4.0, dtype="fp32", numel=2**26),
        speed_row("cuda", 9.0, dtype="bf16", numel=2**26),
    ]
    axes = plots.speed_by_dtype(rows).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["bf16, $2^{27}$", "fp32, $2^{26}$"]
    bars = [(round(bar.get_center()[0]), bar.get_height()) for bar in axes.patches]
    assert bars == [(0, pytest.approx(50)), (1, pytest.approx(50)), (1, pytest.approx(25))]


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
    ],
)
def test_what_the_host_bounds_is_not_quoted(plots, fields, expected):
    row = speed_row("cuda", 2.0) | {"gpu": "H200"}
    row |= {column: str(value) for column, value in fields.items()}
    assert plots.quotable(row) is expected


def test_picture_of_a_gpu_shows_kernels(plots):
    gpu = {"gpu": "H200", "numel": 2**27}
    rows = [
        speed_row("cuda", 2.0, api="kernel", **gpu),
        speed_row("aten", 4.0, api="kernel", **gpu),
        speed_row("naive", 9.0, **gpu),
    ]
    figure = plots.speed_by_dtype(rows)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([50, 25])
    assert ": kernels, large tensors\nH200, torch 2" in figure.get_suptitle()


def test_picture_of_small_tensors(plots):
    rows = [
        {"section": "small", "op": f"{op} 2^{size}", "provider": provider, "ms": ms}
        for op, size, provider, ms in (
            ("mish_f", 10, "cuda", "0.001"),
            ("mish_f", 12, "cuda", "0.002"),
            ("mish_f", 12, "aten", "0.004"),
            ("relu6_fm", 10, "cuda", "0.003"),
        )
    ]
    rows.append({"section": "matrix", "op": "prelu_row_f", "provider": "cuda", "ms": "9"})
    figure = plots.small_tensors(rows)
    assert [axes.get_title() for axes in figure.axes] == ["mish forward", "relu6 forward with mask"]
    cuda, aten = figure.axes[0].get_lines()
    assert list(zip(cuda.get_xdata(), cuda.get_ydata())) == [(2**10, 1), (2**12, 2)]
    assert list(zip(aten.get_xdata(), aten.get_ydata())) == [(2**12, 4)]


def test_picture_of_networks(plots):
    rows = [
        {"net": "resnet", "mode": mode, "ms": ms, "step_gib": gib}
        for mode, ms, gib in (("torch", "2", "4"), ("fused", "3", "2"), ("fused remat", "4", "1"))
    ]
    time, memory = plots.networks(rows).axes
    assert [bar.get_width() for bar in time.patches] == [100, 150, 200]
    assert [bar.get_width() for bar in memory.patches] == [100, 50, 25]
    assert [label.get_text() for label in time.get_yticklabels()] == ["resnet"]


def memory_row(provider, saved_bytes, inplace=False, case="alone", method="", ms=""):
    row = {"provider": provider, "activation": "relu6", "dtype": "bf16", "case": case}
    row |= {"inplace": inplace, "saved_bytes": saved_bytes, "method": method, "ms": ms}
    row |= {"gpu": "H200", "torch": "2", "commit": "c"}
    return {column: str(value) for column, value in row.items()}


def test_picture_of_memory(plots):
    rows = [
        memory_row("aten", 2.0),
        memory_row("triton", 0.125),
        memory_row("triton", 0.25, inplace=True),
        memory_row("naive", ""),
    ]
    figure = plots.memory(rows)
    (axes,) = figure.axes
    bars = [(round(bar.get_center()[1]), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 0.125), (1, 0.25), (0, 2.0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["alone", "alone\nin place"]
    assert "H200, torch 2" in figure.get_suptitle()


def test_picture_of_rematerialization(plots):
    rows = [
        memory_row("aten", 9.0),
        memory_row("aten", 4.0, case="csp", ms=2.0),
        memory_row("fallback", 3.0, case="csp", method="rematerialize", ms=3.0),
        memory_row("aten", 1.0, case="csp", method="checkpoint", ms=4.0),
    ]
    bytes_, time = plots.rematerialization(rows).axes
    assert [bar.get_width() for bar in bytes_.patches] == [100, 75, 25]
    assert [bar.get_width() for bar in time.patches] == [100, 150, 200]
    with pytest.raises(plots.NothingToDraw):
        plots.rematerialization(rows[:2])


@pytest.mark.skipif(INTERPRET, reason="times nothing in the interpreter")
def test_memory_of_a_stack(monkeypatch):
    monkeypatch.setattr(compare_memory, "ROUNDS", 1)
    monkeypatch.setattr(compare_memory, "SECONDS", 0.001)
    compared = [providers.FALLBACK, *(each for each in providers.PROVIDERS if each.name == "aten")]
    name = "conv-norm-act stack"
    contenders = [
        compare_memory.Contender(provider, False, method)
        for provider in compared
        for method in compare_memory.METHODS
    ]
    contenders = [
        each for each in contenders if each.can(ROWS["mish"], compare_memory.MODELS[name], False)
    ]
    rows = {
        (row["provider"], row["method"]): row
        for row in compare_memory.rows_of(ROWS["mish"], "fp32", name, contenders)
    }
    found = {
        key: [row[column] for column in ("by_activations", "by_norms", "by_layers")]
        for key, row in rows.items()
    }
    # Six layers, 4 bytes an element: all inputs but the first convolution's, which is the data.
    everything = [4.0, pytest.approx(4.0, rel=0.01), pytest.approx(4 * 5 / 6, rel=0.01)]
    assert found == {
        ("fallback", ""): everything,
        ("fallback", "rematerialize"): [4.0, everything[1], 0.0],
        ("fallback", "rematerialize-norm"): [0.0, everything[1], 0.0],
        ("aten", ""): everything,
        ("aten", "checkpoint"): ["", "", ""],
    }
    for (_, method), row in rows.items():
        assert row["ms"] > 0
        if method != "checkpoint":
            parts = [row[column] for column in compare_memory.KINDS]
            assert row["saved_bytes"] == pytest.approx(sum(parts))
    assert rows["aten", "checkpoint"]["saved_bytes"] < 4.0


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_memory_of_a_mask():
    (triton,) = (each for each in PROVIDERS if each.name == "triton")
    contender = compare_memory.Contender(triton, True, "")
    (row,) = compare_memory.rows_of(ROWS["relu6"], "bf16", "alone", [contender])
    assert [row[kind] for kind in compare_memory.KINDS] == [1 / 8, 0, 0, 0, 0]
    assert row["saved_bytes"] == 1 / 8


def test_all_that_can_be_drawn_is_drawn(plots, monkeypatch, tmp_path, capsys):
    def draw():
        monkeypatch.setattr(sys, "argv", ["plot_results", "--results", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            environment.run(plots.main)
        return ended.value.code, capsys.readouterr()

    status, output = draw()
    assert status == 2
    assert f"{tmp_path / 'memory.csv'}: No such file or directory" in output.out
    assert output.err == f"nothing to draw in {tmp_path}: run the comparisons first\n"

    environment.write_csv(tmp_path / "memory.csv", [{"provider": "aten"}])
    environment.write_csv(tmp_path / "speed.csv", [speed_row("aten", 2.0)])
    status, output = draw()
    assert status == 0
    assert "memory.csv has no column 'saved_bytes'" in output.out
    assert "no speed_by_size.png" in output.out
    assert [path.name for path in tmp_path.glob("*.png")] == ["speed_by_dtype.png"]


def test_without_matplotlib_pictures_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("benchmarks.plot_results", "benchmarks.pictures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.plot_results", run_name="__main__")
    assert ended.value.code == 2
    assert "pictures need matplotlib" in capsys.readouterr().err
