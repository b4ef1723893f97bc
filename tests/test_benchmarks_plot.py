"""The pictures that `python -m benchmarks plot` draws of results."""

import pytest

from benchmarks import environment
from tests.shared.benchmarks import status

plot = pytest.importorskip("benchmarks.plot", reason="needs matplotlib")


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


def test_picture_by_size():
    rows = [speed_row("aten", 5.0, numel=numel) for numel in (2**22, 2**20)]
    rows += [speed_row("cuda", 2.0, numel=2**20), speed_row("cuda", 1.25, numel=2**22)]
    rows += [
        speed_row("cuda", 9.0, layout="odd"), speed_row("cuda", 9.0, api="kernel"),
        speed_row("cuda", 9.0, launch="graph"), speed_row("cuda", 9.0, dtype="fp32"),
        speed_row("naive", 9.0, share_of_copy=""),
    ]  # fmt: skip
    figure = plot.speed_by_size(rows)
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
    with pytest.raises(plot.NothingToDraw, match="one size"):
        plot.speed_by_size(rows[:1])


def test_picture_by_dtype():
    rows = [
        speed_row("cuda", 2.0, dtype="bf16", numel=2**27),
        speed_row("cuda", 2.0, dtype="fp32", numel=2**26),
        speed_row("aten", 4.0, dtype="fp32", numel=2**26),
        speed_row("cuda", 9.0, dtype="bf16", numel=2**26),
    ]
    axes = plot.speed_by_dtype(rows).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["bf16, $2^{27}$", "fp32, $2^{26}$"]
    bars = [(round(bar.get_center()[0]), bar.get_height()) for bar in axes.patches]
    assert bars == [(0, pytest.approx(50)), (1, pytest.approx(50)), (1, pytest.approx(25))]


def test_picture_of_a_gpu_shows_kernels():
    gpu = {"gpu": "H200", "numel": 2**27}
    rows = [
        speed_row("cuda", 2.0, api="kernel", **gpu),
        speed_row("aten", 4.0, api="kernel", **gpu),
        speed_row("naive", 9.0, **gpu),
    ]
    figure = plot.speed_by_dtype(rows)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([50, 25])
    assert ": kernels, large tensors\nH200, torch 2" in figure.get_suptitle()


def test_picture_of_graphs():
    """It shows kernels in graphs alone, and those only whose time is the device's."""
    of_graph = {"gpu": "H200", "api": "kernel", "launch": "graph", "bound": "device"}
    rows = [
        speed_row("cuda", 0.002, numel=2**12, **of_graph),
        speed_row("cuda", 0.001, numel=2**10, **of_graph),
        speed_row("aten", 0.004, numel=2**12, **of_graph),
        speed_row("aten", 0.009, numel=2**10, **of_graph | {"bound": "host"}),
        speed_row("naive", 0.009, numel=2**10, **of_graph | {"api": "public"}),
        speed_row("naive", 0.009, numel=2**10, **of_graph | {"launch": "call"}),
    ]
    figure = plot.speed_in_graphs(rows)
    assert [axes.get_title() for axes in figure.axes] == ["mish forward"]
    cuda, aten = figure.axes[0].get_lines()
    assert list(zip(cuda.get_xdata(), cuda.get_ydata())) == [(2**10, 1), (2**12, 2)]
    assert list(zip(aten.get_xdata(), aten.get_ydata())) == [(2**12, 4)]
    with pytest.raises(plot.NothingToDraw):
        plot.speed_in_graphs(rows[3:])


def test_many_graphs_are_at_most_four_beside_each_other():
    fields = {"gpu": "H200", "api": "kernel", "launch": "graph", "bound": "device"}
    rows = [
        speed_row("cuda", 0.001, activation=name, direction=direction, **fields)
        for name in ("mish", "swish", "relu6", "prelu", "crelu")
        for direction in ("forward", "backward")
    ]
    figure = plot.speed_in_graphs(rows)
    assert [axes.get_title() for axes in figure.axes][:2] == ["mish forward", "mish backward"]
    assert len(figure.axes) == 10
    assert figure.axes[0].get_gridspec().get_geometry() == (3, 4)


def test_picture_of_small_tensors():
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
    figure = plot.small_tensors(rows)
    assert [axes.get_title() for axes in figure.axes] == ["mish forward", "relu6 forward with mask"]
    cuda, aten = figure.axes[0].get_lines()
    assert list(zip(cuda.get_xdata(), cuda.get_ydata())) == [(2**10, 1), (2**12, 2)]
    assert list(zip(aten.get_xdata(), aten.get_ydata())) == [(2**12, 4)]


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_picture_of_networks():
    rows = [
        {"net": "resnet", "mode": mode, "ms": ms, "min": ms, "step_gib": gib}
        for mode, ms, gib in (("torch", "2", "4"), ("fused", "3", "2"), ("fused remat", "4", "1"))
    ]
    time, memory = plot.networks(rows).axes
    assert widths(time) == [100, 150, 200]
    assert widths(memory) == [100, 50, 25]
    assert [label.get_text() for label in time.get_yticklabels()] == ["resnet"]


def test_picture_of_networks_shows_what_was_trained():
    measured = (
        ("a", "training", "torch", "2", "4"),
        ("a", "training", "checkpoint", "3", "1"),
        ("a", "training", "fused triton", "1", ""),
        ("a", "training", "fused", "", ""),
        ("a", "inference", "torch", "3", "3"),
        ("a", "inference", "fused", "9", "9"),
        ("b", "training", "fused", "3", "3"),
    )
    columns = ("net", "direction", "mode", "ms", "step_gb")
    where = {"min": "1", "gpu": "H200", "torch": "2", "commit": "c"}
    rows = [dict(zip(columns, row)) | where for row in measured]
    figure = plot.networks(rows)
    time, memory = figure.axes
    assert widths(time) == [100, 50, 150]
    assert widths(memory) == [100, 25]
    assert [label.get_text() for label in time.get_yticklabels()] == ["a"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["torch", "fused triton", "checkpoint"]
    assert "H200, torch 2, commit c" in figure.get_suptitle()
    with pytest.raises(plot.NothingToDraw):
        plot.networks(rows[-2:])


def memory_row(provider, saved_bytes, inplace=False, case="alone", method="", ms=""):
    row = {"provider": provider, "activation": "relu6", "dtype": "bf16", "case": case}
    row |= {"inplace": inplace, "saved_bytes": saved_bytes, "method": method, "ms": ms}
    row |= {"gpu": "H200", "torch": "2", "commit": "c"}
    return {column: str(value) for column, value in row.items()}


def test_picture_of_memory():
    rows = [
        memory_row("aten", 2.0),
        memory_row("triton", 0.125),
        memory_row("triton", 0.25, inplace=True),
        memory_row("naive", ""),
    ]
    figure = plot.memory(rows)
    (axes,) = figure.axes
    bars = [(round(bar.get_center()[1]), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 0.125), (1, 0.25), (0, 2.0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["alone", "alone\nin place"]
    assert "H200, torch 2" in figure.get_suptitle()


def test_picture_of_rematerialization():
    rows = [
        memory_row("aten", 9.0),
        memory_row("aten", 4.0, case="csp", ms=2.0),
        memory_row("fallback", 3.0, case="csp", method="rematerialize", ms=3.0),
        memory_row("aten", 1.0, case="csp", method="checkpoint", ms=4.0),
    ]
    bytes_, time = plot.rematerialization(rows).axes
    assert [bar.get_width() for bar in bytes_.patches] == [100, 75, 25]
    assert [bar.get_width() for bar in time.patches] == [100, 150, 200]
    with pytest.raises(plot.NothingToDraw):
        plot.rematerialization(rows[:2])


def test_all_that_can_be_drawn_is_drawn(tmp_path, capsys):
    def draw():
        return status("plot", "--results", tmp_path), capsys.readouterr()

    exit_status, output = draw()
    assert exit_status == 2
    assert f"{tmp_path / 'memory.csv'}: No such file or directory" in output.out
    assert output.err == f"nothing to draw in {tmp_path}: run the comparisons first\n"

    environment.write_csv(tmp_path / "memory.csv", [{"provider": "aten"}])
    environment.write_csv(tmp_path / "speed.csv", [speed_row("aten", 2.0)])
    exit_status, output = draw()
    assert exit_status == 0
    assert "memory.csv has no column 'saved_bytes'" in output.out
    assert "no speed_by_size.png" in output.out
    assert [path.name for path in tmp_path.glob("*.png")] == ["speed_by_dtype.png"]
