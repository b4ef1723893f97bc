"""The tables that the tests run over: every row with its parameters, backends, dtypes."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from fused_act import ops
from fused_act.activations import FAMILIES
from fused_act.dispatch import DTYPES, Kernels
from fused_act.families.base import Row
from tests.shared import cpu_ops
from tests.shared.facts import FACTS, Facts

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """An activation with parameters, as functions of `x` alone."""

    facts: Facts
    parameters: tuple[float, ...] = ()

    @property
    def row(self) -> Row:
        return self.facts.row

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def has_inplace(self) -> bool:
        return hasattr(self.row, "InplaceFunction")

    @property
    def saves(self) -> str:
        """What the kernels save for backward, out of place."""
        return self.row.Function.saves

    def arguments(self, x: object) -> tuple:
        """What follows `x`: parameters, or a weight that depends on `x`.

        So whatever differentiates with respect to `x` alone goes through the weight's gradient.
        """
        if self.facts.weight_derivative is None:
            return self.parameters
        if not isinstance(x, Tensor):
            return (torch.full((1,), 0.3, device=DEVICE),)
        return ((0.3 + 0.01 * x.sum()).to(x.dtype).reshape(1),)

    def function(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Ours, as users call it."""
        options = {"inplace": inplace} if self.has_inplace else {}
        return self.facts.function(x, *self.arguments(x), **options)

    def torch_function(self, x: Tensor, inplace: bool = False) -> Tensor:
        """torch's own."""
        options = {"inplace": inplace} if self.has_inplace else {}
        return self.facts.torch_function(x, *self.arguments(x), **options)

    def apply(self, x: Tensor) -> Tensor:
        """The Function by itself."""
        return self.row.Function.apply(x, *self.arguments(x))

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.parameters)])


# Of every row there is.
ALL_CASES = [
    Case(FACTS[row.name], parameters)
    for rows in FAMILIES.values()
    for row in rows
    for parameters in FACTS[row.name].parameters
]
CASES = [case for case in ALL_CASES if case.row.family == "elementwise"]
# With more parameters than the other tests run over.
ACCURACY_CASES = [
    Case(case.facts, parameters)
    for case in {case.name: case for case in ALL_CASES}.values()
    for parameters in (
        *(case.facts.parameters if case.facts.weights == () else ()),
        *case.facts.more_parameters,
        *((weight,) for weight in case.facts.weights),
    )
]
ELEMENTWISE = [case for case in ACCURACY_CASES if case.row.family == "elementwise"]
OF_OUTPUT = [case for case in ACCURACY_CASES if case.facts.derivative_from_output is not None]

# Without a GPU the Triton kernels run in the interpreter, in a process of their own, which runs
# nothing but what is marked so.
BACKENDS = [
    pytest.param("triton", marks=pytest.mark.interpreted if INTERPRET else pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]

# Without a GPU the ops of csrc/ run on CPU tensors, called by the host extension or by Python.
ON_HOST = {"csrc": cpu_ops.in_cpp, "csrc-python": cpu_ops.in_python}
OF_CSRC = [pytest.param(way, id=way) for way in ON_HOST]

elementwise_rows = pytest.mark.parametrize("case", CASES, ids=str)
all_rows = pytest.mark.parametrize("case", ALL_CASES, ids=str)
all_accuracy_cases = pytest.mark.parametrize("case", ACCURACY_CASES, ids=str)


def of_family(family: str):
    """The rows of one family."""
    found = [case for case in ALL_CASES if case.row.family == family]
    return pytest.mark.parametrize("case", found, ids=str)


elementwise_accuracy_cases = pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
all_backends = pytest.mark.parametrize("backend", BACKENDS)
all_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
both_16_bit_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float16", "bfloat16"])


def combinations(ways):
    """Every row in each of the ways to compute it, in place where it has such a way."""
    return pytest.mark.parametrize(
        ("case", "way", "inplace"),
        [
            pytest.param(
                case, way.values[0], inplace, marks=way.marks, id=f"{case}-{way.id}{suffix}"
            )
            for case in ALL_CASES
            for way in ways
            for inplace, suffix in ((False, ""), (True, "-inplace"))
            if not inplace or (case.has_inplace and way.id != "Function")
        ],
    )


def kernels(backend: str, case: Case) -> Kernels:
    """The raw ops of a case."""
    return ops.kernels(f"fused_act_{backend}")[case.name]
