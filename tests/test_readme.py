"""The Python blocks of the README run as they stand; figures are those of their sources."""

import collections
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_act
from tests import readme
from tests.shared.models import activations, classes

TEXT = readme.README.read_text()
# By the heading above.
BLOCKS = dict(
    re.findall(r"^##+ ([^\n]+)\n(?:(?!##)[^\n]*\n)*?```python\n(.*?)```", TEXT, re.M | re.S)
)

RESTORE = "Before you explain, quantize, count or trace: restore"
HOOKS = "Hooks of saved tensors that compress"


def run(title, **names):
    """The names after the block below `title`, which begins with `names`."""
    exec(compile(BLOCKS[title], f"README.md, {title}", "exec"), names)
    return names


def classes_of_ours(model):
    return [type(module) for module in activations(model)]


def test_every_block_is_run():
    assert list(BLOCKS) == ["Use", RESTORE, HOOKS, "torch", "timm", "transformers"]
    assert len(BLOCKS) == TEXT.count("```python")


WRITTEN = [
    pytest.param(page, name, id=f"{page.relative_to(readme.ROOT)}-{name}")
    for page, tables in readme.PAGES.items()
    for name in tables
]


@pytest.mark.parametrize(("page", "name"), WRITTEN)
def test_table_is_that_of_its_source(page, name):
    pytest.importorskip("tabulate")
    if name == "training" or page != readme.README or name in ("summary", "speed"):
        for package in ("matplotlib", "sklearn"):
            pytest.importorskip(package, reason="needs the extra 'bench'")
    text = page.read_text()
    start, end = readme.between(name, text)
    assert text[start:end] == readme.PAGES[page][name]() + "\n"


# What is measured: a number with a unit, or a decimal that is no version.
FIGURE = re.compile(
    r"\d[\d,.]*\s*(?:%|[µmn]s\b|[KMGT]i?B\b|(?:ULP|instructions|times)\b)|(?<!≥ )(?<![\d.])\d+\.\d+"
)


def typed_in(text):
    """The figures of a page outside code, links and what is written by tests/readme.py."""
    assert text.count("`") % 2 == 0
    for part in (
        r"<!-- ([\w ]+): written by [^>]*-->.*?<!-- end of \1 -->",
        r"```.*?```",
        r"(?m:^    [^\n]*$)",
        r"`[^`]*`",
        r"\]\([^)]*\)",
        r"\(8\.0, [^)]*PTX\)",  # architectures
    ):
        text = re.sub(part, "", text, flags=re.S)
    return FIGURE.findall(text)


def test_no_figure_is_typed_in():
    assert not typed_in(TEXT)


@pytest.mark.parametrize(
    "figure", ["53 instructions", "0.54 of the time", "97 %", "222 µs", "9 GiB"]
)
def test_a_figure_that_is_typed_in_is_found(figure):
    assert typed_in(f"{TEXT}\nOurs takes {figure}.\n")


def test_what_must_not_be_quoted_is_not():
    """Rows that the host or the start of a graph bounds are neither drawn nor written anywhere."""
    plot = pytest.importorskip("benchmarks.plot", reason="needs matplotlib")
    drawn = plot.drawn(readme.rows("nvidia-h200/speed.csv"))
    assert len(drawn) > 100
    assert {(row["api"], row["launch"]) for row in drawn} == {("kernel", "call")}
    by_time = [row for row in drawn if not row.get("bound")]  # of before the host was kept out
    assert min(map(plot.numel, by_time), default=2**30) > 2**22
    for api, size in (("kernel", readme.measured.LARGE), ("public", readme.measured.LARGEST)):
        quoted = readme.measured.speed(api, size).values()
        assert {row["launch"] for row in quoted} == {"call"}
        assert {row.get("bound", "") for row in quoted} <= {"", "device"}
        times = [float(row["median"]) for row in quoted if not row.get("bound")]
        assert min(times, default=1.0) >= (0.1 if api == "kernel" else 0.6)


def test_a_mode_of_a_network_is_that_of_the_newest_file_that_has_it(tmp_path):
    header = "net,direction,mode,ms,min,step_gb"
    older = ["a,training,torch,2,2,2", "a,training,fused remat,4,2,2", "b,training,torch,1,1,1"]
    newer = ["a,training,torch,4,2,8", "a,training,fused,2,1,2", "a,inference,fused,9,9,9"]
    paths = tmp_path / "older.csv", tmp_path / "newer.csv"
    for path, lines in zip(paths, (older, newer)):
        path.write_text("\n".join((header, *lines, "b,training,fused,,,")))
    paths[0].write_text(paths[0].read_text() + "\nb,training,fused,3,2,1\n")
    found = readme.measured.network_ratios(paths)
    assert found == {
        ("a", "fused"): (0.5, 0.25, 0.5),
        ("a", "fused remat"): (2, 1, 1),  # beside torch's of that time
        ("b", "fused"): (3, 1, 2),
    }


def test_use():
    model, x = nn.Sequential(nn.Mish(), nn.SiLU(), nn.ReLU6()), torch.randn(5)
    before = classes(model)
    names = run("Use", model=model, x=x)
    assert torch.equal(names["y"], F.mish(x))
    assert type(names["layer"]) is fused_act.ReLU6
    assert classes(names["model"]) == before


def test_restore():
    model = nn.Sequential(nn.Linear(3, 3), nn.Mish())
    expected = [node.name for node in torch.fx.symbolic_trace(model).graph.nodes]
    fused_act.replace_activations(model)
    assert run(RESTORE, model=model, torch=torch, fused_act=fused_act)["names"] == expected
    assert type(model[1]) is fused_act.Mish


def test_hooks():
    """On a CPU, where ReLU6 saves its input; what kernels save: test_autograd.py."""
    x = torch.tensor([-2.0, 0.5, 3.0, 7.0], requires_grad=True)  # fp8 has all of them
    with run(HOOKS)["hooks"]:
        y = fused_act.relu6(x * 1)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.tolist() == [0, 1, 1, 0]


def test_torch():
    assert classes_of_ours(run("torch")["model"]) == [fused_act.ReLU6, fused_act.Mish]


@pytest.mark.zoo
@pytest.mark.timm
def test_timm(timm):
    names = run("timm")
    assert classes_of_ours(names["model"]) == [fused_act.Mish] * 67
    swapped = collections.Counter(classes_of_ours(names["swapped"]))
    assert swapped == {fused_act.SiLU: 49, fused_act.Sigmoid: 16}


@pytest.fixture
def act2fn(transformers):
    """transformers' activations by name; what a test changes is put back."""
    table = transformers.activations.ACT2FN
    before = {name: dict.__getitem__(table, name) for name in table}
    yield table
    table.update(before)


@pytest.mark.zoo
def test_transformers(act2fn):
    theirs, x = act2fn["quick_gelu"], torch.randn(99)
    model = run("transformers")["model"]
    assert classes_of_ours(model) == [fused_act.Mish] * model.config.num_hidden_layers
    for name, ours in (
        ("mish", fused_act.Mish),
        ("relu6", fused_act.ReLU6),
        ("silu", fused_act.SiLU),
        ("swish", fused_act.SiLU),
        ("quick_gelu", fused_act.Swish),
    ):
        assert type(act2fn[name]) is ours
    assert torch.equal(act2fn["quick_gelu"](x), theirs(x))
