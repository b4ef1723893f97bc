"""Swap a model's activation modules for fused ones, and back.

The module object stays; only its class changes. So its hooks, its name, its training flag and every
other reference to it hold, and nothing else in the model is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from fused_act.activations.leaky_relu import LeakyReLU
from fused_act.activations.mish import Mish
from fused_act.activations.prelu import PReLU
from fused_act.activations.relu import ReLU
from fused_act.activations.relu6 import ReLU6
from fused_act.activations.selu import SELU
from fused_act.activations.sigmoid import Sigmoid
from fused_act.activations.swish import SiLU
from fused_act.activations.tanh import Tanh

Model = TypeVar("Model", bound=nn.Module)

FUSED = {
    nn.Mish: Mish,
    nn.SiLU: SiLU,
    nn.ReLU6: ReLU6,
    nn.Sigmoid: Sigmoid,
    nn.Tanh: Tanh,
    nn.ReLU: ReLU,
    nn.LeakyReLU: LeakyReLU,
    nn.SELU: SELU,
    nn.PReLU: PReLU,
}
TORCH = {fused: original for original, fused in FUSED.items()}


def fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The fused class for `module`, by exact type: a subclass may compute something else."""
    if type(module) is nn.ReLU6 and (module.min_val, module.max_val) != (0.0, 6.0):
        return None  # a Hardtanh of other bounds: somebody has set them
    transformers = sys.modules.get("transformers.activations")
    if transformers is not None:
        if type(module) is getattr(transformers, "SiLUActivation", None):
            return SiLU
        if type(module) is getattr(transformers, "MishActivation", None):
            return Mish
    return FUSED.get(type(module))


def replace_activations(
    model: Model, filter_fn: Callable[[str, nn.Module], bool] | None = None
) -> Model:
    """Make torch's activation modules in `model` fused ones, in place.

    These are `Mish`, `SiLU`, `ReLU6`, `Sigmoid`, `Tanh`, `ReLU`, `LeakyReLU`, `SELU` and `PReLU`,
    and transformers' `SiLUActivation` and `MishActivation`. Modules are matched by exact type and
    keep their `inplace`; parameters, buffers and `state_dict` stay as they are.

    Args:
        model: any module, an activation itself included.
        filter_fn: `filter_fn(name, module)`, with the name as in `model.named_modules()` (that is
            the first, for a module that has several); only modules for which it returns true are
            replaced. None replaces all.

    Returns:
        `model`.
    """
    for name, module in model.named_modules():
        fused = fused_class(module)
        if fused is None or (filter_fn is not None and not filter_fn(name, module)):
            continue
        if type(module) not in FUSED:
            module.replaced_class = type(module)
            module.inplace = False
        module.__class__ = fused
    return model


def restore_activations(model: Model) -> Model:
    """The inverse of `replace_activations`: make the fused modules in `model` torch's, in place.

    Not `Swish`, of which torch has none.

    Returns:
        `model`.
    """
    for module in model.modules():
        if type(module) not in TORCH:
            continue
        if "replaced_class" in module.__dict__:
            module.__class__ = module.__dict__.pop("replaced_class")
            del module.inplace
        else:
            module.__class__ = TORCH[type(module)]
    return model
