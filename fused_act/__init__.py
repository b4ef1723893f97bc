"""Fused Mish, Swish (SiLU) and ReLU6 for PyTorch, in Triton and in CUDA C++."""

from fused_act import ops  # noqa: F401 - defines torch.ops.fused_act_cuda and fused_act_triton
from fused_act.activations.mish import Mish, MishFunction, mish
from fused_act.activations.relu6 import ReLU6, ReLU6Function, relu6
from fused_act.activations.swish import SiLU, Swish, SwishFunction, silu, swish
from fused_act.backends import available_backends, use_backend
from fused_act.rematerialization import rematerialize
from fused_act.replace import replace_activations, restore_activations
from fused_act.version import __version__

__all__ = [
    "Mish",
    "MishFunction",
    "ReLU6",
    "ReLU6Function",
    "SiLU",
    "Swish",
    "SwishFunction",
    "__version__",
    "available_backends",
    "mish",
    "relu6",
    "rematerialize",
    "replace_activations",
    "restore_activations",
    "silu",
    "swish",
    "use_backend",
]
