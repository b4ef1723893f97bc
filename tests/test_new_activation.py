"""A new activation takes five edits and a row of facts, and all topics then test it.

SquaredReLU, y = max(x, 0)^2 (So et al. 2021, arXiv:2109.08668), is added to a copy of the tree.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.host_kernels import COMPILER

ROOT = Path(__file__).parent.parent

MODULE = '''
"""SquaredReLU: y = max(x, 0)^2. So et al., "Primer", 2021, arXiv:2109.08668."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting

from fused_act.families.elementwise import Elementwise


def torch_forward(x: Tensor, inplace: bool = False) -> Tensor:
    return torch.relu_(x).square_() if inplace else torch.relu(x).square()


def torch_backward(grad_output: Tensor, x: Tensor) -> Tensor:
    grad = grad_output * (2 * torch.relu(x))
    return torch.ops.aten.threshold_backward.default(grad, x, 0)


ROW = Elementwise(
    name="squared_relu",
    spelling="SquaredReLU",
    torch_forward=torch_forward,
    torch_backward=torch_backward,
)


def squared_relu(x: Tensor, inplace: bool = False) -> Tensor:
    if is_scripting():
        return torch_forward(x, inplace)
    return ROW.activate(x, inplace=inplace)


class SquaredReLU(torch.nn.Module):
    def __init__(self, inplace: bool = False):
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return squared_relu(input, self.inplace)
'''

TRITON = """
@triton.jit
def squared_relu_forward(x, LOW: tl.constexpr):
    r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return r * r


@triton.jit
def squared_relu_derivative(x, LOW: tl.constexpr):
    return 2.0 * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


"""

STRUCT = """
// y = max(x, 0)^2, arXiv:2109.08668:   y' = 2 max(x, 0).
template <typename T>
struct SquaredReLU {
  __host__ __device__ float forward(float x) const {
    const float r = clamp_min(x, 0.0f);
    return r * r;
  }

  __host__ __device__ float derivative(float x) const { return 2.0f * clamp_min(x, 0.0f); }
};

"""

FACTS = """
SQUARED_RELU = Facts(
    name="squared_relu",
    title="SquaredReLU",
    paper="So et al. 2021, arXiv:2109.08668",
    function=squared_relu.squared_relu,
    torch_function=squared_relu.torch_forward,
    module=squared_relu.SquaredReLU,
    torch_module=squared_relu.SquaredReLU,
    definition=lambda mp, x: max(x, mp.mpf(0)) ** 2,
    derivative_definition=lambda mp, x: 2 * max(x, mp.mpf(0)),
    forward=lambda x: x.clamp(min=0.0).square(),
    derivative=lambda x: 2 * x.clamp(min=0.0),
    budgets={
        ("triton", 16): (8, 10),
        ("triton", 32): (16, 18),
        ("cuda", 16): (10, 12),
        ("cuda", 32): (16, 18),
    },
    clamps={"forward": (16, 32), "backward": (16, 32)},
    shape=("", "0 to ∞", "yes", "0.50", "below"),
)

"""

# The five edits, by file: what the new text stands before. None makes the file.
EDITS = {
    "fused_act/activations/squared_relu.py": {None: MODULE.lstrip()},
    "fused_act/activations/__init__.py": {
        "    swish,\n    tanh,\n": "    squared_relu,\n",
        '    ),\n    "weighted"': "        squared_relu.ROW,\n",
    },
    "fused_act/backends/triton/activations.py": {
        "@triton.jit\ndef leaky_relu_forward": TRITON.lstrip()
    },
    "csrc/activations.cuh": {"// y = x where x > 0, else slope x": STRUCT.lstrip()},
    "csrc/register.cu": {
        "  mirrored::implement": '  elementwise::implement<SquaredReLU>(library, "squared_relu");\n'
    },
}
ROW_OF_FACTS = {
    "tests/shared/facts.py": {
        "# In the order of pictures": FACTS.lstrip(),
        "    *(SIGMOID, TANH,": "    SQUARED_RELU,\n",
        "from fused_act.activations.selu": "from fused_act.activations import squared_relu\n",
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
    chosen = ("-k", "squared_relu", "-m", "not full")
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
