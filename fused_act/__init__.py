"""Fused Mish, Swish (SiLU), ReLU6 and their family for PyTorch, in Triton and in CUDA C++."""

from fused_act import backends  # noqa: F401 - registers them, and defines the raw ops
from fused_act.activations.crelu import CReLU, CReLUFunction, crelu
from fused_act.activations.leaky_relu import LeakyReLU, LeakyReLUFunction, leaky_relu
from fused_act.activations.mish import Mish, MishFunction, mish
from fused_act.activations.prelu import PReLU, PReLUFunction, prelu
from fused_act.activations.relu import ReLU, ReLUFunction, relu
from fused_act.activations.relu6 import ReLU6, ReLU6Function, relu6
from fused_act.activations.selu import SELU, SELUFunction, selu
from fused_act.activations.sigmoid import Sigmoid, SigmoidFunction, sigmoid
from fused_act.activations.swish import (
    LearnableSwishFunction,
    SiLU,
    Swish,
    SwishFunction,
    silu,
    swish,
)
from fused_act.activations.tanh import Tanh, TanhFunction, tanh
from fused_act.dispatch import available_backends, use_backend
from fused_act.rematerialization import rematerialize
from fused_act.replace import (
    Replacement,
    replace_activations,
    restore_activations,
    restored,
)
from fused_act.version import __version__

__all__ = [
    "SELU",
    "CReLU",
    "CReLUFunction",
    "LeakyReLU",
    "LeakyReLUFunction",
    "LearnableSwishFunction",
    "Mish",
    "MishFunction",
    "PReLU",
    "PReLUFunction",
    "ReLU",
    "ReLU6",
    "ReLU6Function",
    "ReLUFunction",
    "Replacement",
    "SELUFunction",
    "SiLU",
    "Sigmoid",
    "SigmoidFunction",
    "Swish",
    "SwishFunction",
    "Tanh",
    "TanhFunction",
    "__version__",
    "available_backends",
    "crelu",
    "leaky_relu",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "rematerialize",
    "replace_activations",
    "restore_activations",
    "restored",
    "selu",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
    "use_backend",
]
