"""What `python -m benchmarks instructions` predicts, and what it says of what is missing."""

import importlib.util

import pytest
import torch

from benchmarks import instructions
from benchmarks.environment import read_csv
from fused_act.activations import ROWS
from fused_act.backends.cuda import extension
from tests.shared import machine_code
from tests.shared.benchmarks import status
from tests.shared.kernels import Variant
from tests.shared.machine_code import Instruction, Kernel


@pytest.mark.parametrize(
    ("registers", "threads", "capability", "warps"),
    [
        (32, 256, 90, 64),
        (33, 128, 90, 48),
        (40, 256, 90, 48),
        (48, 256, 90, 40),
        (56, 256, 90, 32),
        (56, 128, 90, 36),
        (64, 256, 90, 32),
        (32, 256, 86, 48),
    ],
)
def test_warps_that_registers_allow(registers, threads, capability, warps):
    """As in the occupancy calculator of Nsight Compute."""
    kernel = Kernel("", [], registers, threads, torch.float32)
    assert instructions.warps_per_sm(kernel, instructions.GPUS[capability]) == warps


@pytest.mark.parametrize(
    ("direction", "masked", "dtype", "budget"),
    [
        ("forward", False, torch.float16, 31.1),
        ("backward", False, torch.float16, 46.7),
        ("forward", False, torch.float32, 62.2),
        ("backward", False, torch.float32, 93.4),
        ("backward", True, torch.float16, 32.1),
    ],
)
def test_prediction(direction, masked, dtype, budget):
    variant = Variant(ROWS["mish"], direction, masked)
    store = Instruction(0, "", "STG.E.128", "")
    share = {}
    for count in (30, 60, 120):
        # `count` instructions for each of the elements that one store moves.
        rest = [Instruction(16 * i, "", "NOP", "") for i in range(1, count * 16 // dtype.itemsize)]
        code = [store, *rest[:-1], Instruction(16 * len(rest), "", "EXIT", "")]
        row = instructions.row(
            "cuda", "", 90, instructions.GPUS[90], variant, dtype, Kernel("", code, 32, 256, dtype)
        )
        assert row["instructions_per_element"] == count
        assert row["budget"] == pytest.approx(budget, abs=0.05)
        share[count] = row["predicted_share"]
    assert share == {
        count: pytest.approx(min(1, budget / count), rel=0.002) for count in (30, 60, 120)
    }


def test_special_functions_limit_the_prediction():
    variant = Variant(ROWS["mish"], "forward", False)
    code = [Instruction(0, "", "STG.E.128", ""), Instruction(1024, "", "EXIT", "")]
    code[1:1] = [Instruction(16 * i, "", "MUFU.EX2", "") for i in range(1, 63)]
    kernel = Kernel("", code, 32, 256, torch.float16)
    row = instructions.row("cuda", "", 90, instructions.GPUS[90], variant, torch.float16, kernel)
    assert row["predicted_share"] == pytest.approx(31.1 / 8 / (62 / 8), rel=0.002)


def test_what_is_missing_is_said(monkeypatch, tmp_path, capsys):
    library = tmp_path / "libtorch_cuda.so"
    library.write_text("no library")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(instructions, "extension", lambda: None)
    results = tmp_path / "results"
    arguments = ("--capabilities", 80, 90, "--libtorch-cuda", library, "--results", results)
    assert status("instructions", *arguments) == 2
    triton_line, cuda_line, aten_line = capsys.readouterr().err.splitlines()
    assert "triton: triton is not installed" in triton_line
    assert "cuda: this install has no CUDA extension" in cuda_line
    assert "aten: " in aten_line
    assert not list(results.iterdir())


def test_without_cuobjdump(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine_code.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(instructions, "extension", lambda: tmp_path)
    monkeypatch.setattr(instructions, "VARIANTS", [])
    assert status("instructions", "--capabilities", 90, "--results", tmp_path) == 2
    assert "cuobjdump is neither in the triton wheel nor on PATH" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.skipif(extension() is None, reason="needs the CUDA extension")
def test_what_is_there_is_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ("--capabilities", 90, "--bandwidth", 2e12, "--results", tmp_path)
    assert status("instructions", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    rows = read_csv(tmp_path / "ours.csv")
    assert len(rows) == len(instructions.VARIANTS)
    assert {row["provider"] for row in rows} == {"cuda"}
    assert {float(row["bandwidth"]) for row in rows} == {2e12}
    assert "relu6 forward with mask, bfloat16" in printed.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--capabilities", 70), "invalid choice: 70 (choose from 80, 86, 89, 90, 100, 120)"),
        (("--sms", "x"), "argument --sms: expected a positive whole number, got x"),
        (("--clock", 0), "argument --clock: expected a positive number, got 0"),
    ],
)
def test_arguments_that_make_no_sense(capsys, arguments, line):
    assert status("instructions", *arguments) == 2
    assert line in capsys.readouterr().err.replace("'", "")
