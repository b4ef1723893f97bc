"""A new activation takes five edits and a row of facts, and all topics then test it.

HardSwish, y = x * min(max(x + 3, 0), 6) / 6 (arXiv:1905.02244), is added to a copy of the tree.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.compiling import COMPILER

ROOT = Path(__file__).parent.parent

MODULE = '''
"""HardSwish: y = x * min(max(x + 3, 0), 6) / 6. Howard et al. 2019, arXiv:1905.02244."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_scripting

from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

ROW = Elementwise(
    name="hard_swish",
    spelling="HardSwish",
    torch_forward=own("nn.functional.hardswish"),
    torch_backward=torch.ops.aten.hardswish_backward.default,
)


def hard_swish(input: Tensor, inplace: bool = False) -> Tensor:
    if is_scripting():
        return F.hardswish(input, inplace)
    return ROW.activate(input, inplace=inplace)


class HardSwish(torch.nn.Hardswish):
    def forward(self, input: Tensor) -> Tensor:
        return hard_swish(input, self.inplace)
'''

TRITON = """
@triton.jit
def hard_swish_forward(x, LOW: tl.constexpr):
    return x * (clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0))


@triton.jit
def hard_swish_derivative(x, LOW: tl.constexpr):
    return tl.where(x >= 3.0, 1.0, tl.where(x <= -3.0, 0.0, tl.fma(x, 2.0, 3.0) * (1.0 / 6.0)))


"""

STRUCT = """
// y = x min(max(x + 3, 0), 6) / 6, arXiv:1905.02244:   y' = (2 x + 3) / 6 between -3 and 3.
template <typename T>
struct HardSwish {
  __host__ __device__ float forward(float x) const {
    return x * (clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));
  }

  __host__ __device__ float derivative(float x) const {
    return x >= 3.0f ? 1.0f : x <= -3.0f ? 0.0f : fmaf(x, 2.0f, 3.0f) * (1.0f / 6.0f);
  }
};

"""

FACTS = """
HARD_SWISH = Facts(
    name="hard_swish",
    title="HardSwish",
    paper="Howard et al. 2019, arXiv:1905.02244",
    function=hard_swish.hard_swish,
    torch_function=F.hardswish,
    module=hard_swish.HardSwish,
    torch_module=nn.Hardswish,
    definition=lambda mp, x: x * min(max(x + 3, 0), 6) / 6,
    derivative_definition=lambda mp, x: mp.mpf(1 if x >= 3 else 0 if x <= -3 else (2 * x + 3) / 6),
    forward=lambda x: x * (x + 3).clamp(0.0, 6.0) / 6,
    derivative=lambda x: torch.where(
        x >= 3, 1.0, torch.where(x <= -3, 0.0, (2 * x + 3) / 6)
    ).double(),
    budgets={
        ("triton", 16): (14, 16),
        ("triton", 32): (20, 24),
        ("cuda", 16): (14, 16),
        ("cuda", 32): (20, 24),
    },
    clamps={"forward": (16, 32)},
    aten_out=torch.ops.aten.hardswish.out,
)

"""

# The five edits, by file: what the new text stands before. None makes the file.
EDITS = {
    "fused_act/activations/hard_swish.py": {None: MODULE.lstrip()},
    "fused_act/activations/__init__.py": {
        "    leaky_relu,\n    mish,\n": "    hard_swish,\n",
        '    ),\n    "weighted"': "        hard_swish.ROW,\n",
    },
    "fused_act/backends/triton/activations.py": {
        "@triton.jit\ndef leaky_relu_forward": TRITON.lstrip()
    },
    "csrc/activations.cuh": {"// y = x where x > 0, else slope x": STRUCT.lstrip()},
    "csrc/register.cu": {
        "  mirrored::implement": '  elementwise::implement<HardSwish>(library, "hard_swish");\n'
    },
}
ROW_OF_FACTS = {
    "tests/shared/facts.py": {
        "# In the order of pictures": FACTS.lstrip(),
        "    *(SIGMOID, TANH,": "    HARD_SWISH,\n",
        "from fused_act.activations.selu": "from fused_act.activations import hard_swish\n",
    }
}


def edit(tree, edits):
    for name, insertions in edits.items():
        path = tree / name
        for before, text in insertions.items():
            if before is None:
                assert not path.exists()
                path.write_text(text)
                continue
            old = path.read_text()
            assert old.count(before) >= 1, f"{name} has no {before!r}"
            path.write_text(old.replace(before, text + before, 1))


# Without a GPU, and without an extension that has the new activation.
TOPICS = {
    "": {
        *("accuracy", "autograd", "compile", "compiled_derivatives", "concurrency", "export"),
        *("fallback", "faults", "host_kernels", "machine_code", "oracle", "rematerialization"),
        "smoke",
    },
    "1": {
        *("accuracy", "autograd", "compile", "compiled_derivatives", "faults", "kernels"),
        *("layouts", "raw_ops", "rematerialization", "smoke"),
    },
}


@pytest.mark.full
@pytest.mark.parametrize("interpret", TOPICS, ids=["plain", "interpreted"])
def test_five_edits_and_a_row(tmp_path, interpret):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    for name in ("fused_act", "csrc", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "_C*.so", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "Makefile", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert len(EDITS) == 5
    edit(tmp_path, EDITS | ROW_OF_FACTS)
    chosen = ("-k", "hard_swish", "-m", "not full")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, "-v", "tests"],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": interpret or "0", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
    files = re.findall(r"^tests/test_(\w+)\.py::.* PASSED", finished.stdout, re.MULTILINE)
    passed = collections.Counter(files)
    assert passed.keys() >= TOPICS[interpret]
    print(dict(passed))
