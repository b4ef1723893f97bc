"""The whole family, for the pictures and the trainings that compare it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_act


@dataclasses.dataclass(frozen=True)
class Member:
    """One activation of the family.

    Args:
        name: as its module is called.
        module: makes it.
        torch_module: makes what torch has in its place.
        op: its row, by the name that the raw ops have.
        paper: authors, year and where to find it.
        saves: what the kernels save for backward: x, y or bits, and how many for an element.
        widens: the channels that it makes of one.
    """

    name: str
    module: Callable[[], nn.Module]
    torch_module: Callable[[], nn.Module]
    op: str
    paper: str
    saves: str = "x"
    widens: int = 1


class TorchCReLU(nn.Module):
    """What people write: two activations and a copy of both."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), x.neg().relu()], dim=1)


class TorchLearnableSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


def learnable_swish() -> fused_act.Swish:
    return fused_act.Swish(learnable=True)


FAMILY = (
    Member("ReLU", fused_act.ReLU, nn.ReLU, "relu", "Nair, Hinton 2010", "bits"),
    Member(
        "LeakyReLU", fused_act.LeakyReLU, nn.LeakyReLU, "leaky_relu", "Maas et al. 2013", "bits"
    ),
    Member("PReLU", fused_act.PReLU, nn.PReLU, "prelu", "He et al. 2015, arXiv:1502.01852"),
    Member(
        "ReLU6", fused_act.ReLU6, nn.ReLU6, "relu6", "Howard et al. 2017, arXiv:1704.04861", "bits"
    ),
    Member(
        "CReLU", fused_act.CReLU, TorchCReLU, "crelu", "Shang et al. 2016, arXiv:1603.05201",
        "bits", widens=2,
    ),
    Member("SELU", fused_act.SELU, nn.SELU, "selu", "Klambauer et al. 2017, arXiv:1706.02515"),
    Member("Sigmoid", fused_act.Sigmoid, nn.Sigmoid, "sigmoid", "Rumelhart et al. 1986", "y"),
    Member("Tanh", fused_act.Tanh, nn.Tanh, "tanh", "LeCun et al. 1998", "y"),
    Member("Swish", fused_act.SiLU, nn.SiLU, "swish", "Ramachandran et al. 2017, arXiv:1710.05941"),
    Member(
        "Swish, learnable", learnable_swish, TorchLearnableSwish, "learnable_swish",
        "Ramachandran et al. 2017, arXiv:1710.05941",
    ),
    Member("Mish", fused_act.Mish, nn.Mish, "mish", "Misra 2019, arXiv:1908.08681"),
)  # fmt: skip
BY_NAME = {member.name: member for member in FAMILY}
