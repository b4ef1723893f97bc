"""Swap a model's activation modules for fused ones, and back.

The module object stays; only its class changes. So its hooks, its name, its training flag and every
other reference to it hold, and nothing else in the model is touched.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

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


def owns_forward(module: nn.Module) -> bool:
    """Whether the module itself holds a `forward`, which runs whatever its class is."""
    return "forward" in vars(module)


def warn_of_owners(function: str, names: list[str]) -> None:
    if names:
        found = ", ".join(repr(name) if name else "the model itself" for name in names)
        warnings.warn(
            f"{function}: these modules are left as they are, since each holds a `forward` of its "
            f"own, which would run whatever its class is: {found}. Remove the hook or the patch "
            "that put it there, and where one is left, `del module.forward`; then call again",
            stacklevel=3,
        )


def rebased(parametrized: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class that `register_parametrization` would have made of `base`."""
    members = {k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__")}
    metaclass: Callable[..., type[nn.Module]] = type(parametrized)
    return metaclass(parametrized.__name__, (base,), members)


def replace_activations(
    model: Model, filter_fn: Callable[[str, nn.Module], bool] | None = None
) -> Model:
    """Make torch's activation modules in `model` fused ones, in place.

    These are `Mish`, `SiLU`, `ReLU6`, `Sigmoid`, `Tanh`, `ReLU`, `LeakyReLU`, `SELU` and `PReLU`,
    and transformers' `SiLUActivation` and `MishActivation`. Modules are matched by exact type and
    keep their `inplace`; parameters, buffers and `state_dict` stay as they are.

    A module that holds a `forward` of its own (a hook of accelerate, a kernel of Hugging Face or a
    monkeypatch has put it there; accelerate#1971, Liger-Kernel#593) would run that one all the
    same. It is left as it is, and one warning lists the names of all such modules.

    Args:
        model: any module, an activation itself included.
        filter_fn: `filter_fn(name, module)`, with the name as in `model.named_modules()` (that is
            the first, for a module that has several); only modules for which it returns true are
            replaced. None replaces all.

    Returns:
        `model`.
    """
    owners = []
    for name, module in model.named_modules():
        fused = fused_class(module)
        if fused is None or (filter_fn is not None and not filter_fn(name, module)):
            continue
        if owns_forward(module):
            owners.append(name)
            continue
        if type(module) not in FUSED:
            module.replaced_class = type(module)
            module.inplace = False
        module.__class__ = fused
    warn_of_owners("replace_activations", owners)
    return model


def restore_activations(model: Model) -> Model:
    """The inverse of `replace_activations`: make the fused modules in `model` torch's, in place.

    Not `Swish`, of which torch has none. One that was parametrized in the meantime stays so, on
    torch's class (MQBench#57). Other subclasses of the fused classes stay what they are. A module
    that holds a `forward` of its own is left as it is, as in `replace_activations`: what a hook has
    wrapped is the fused `forward`.

    Returns:
        `model`.
    """
    owners = []
    for name, module in model.named_modules():
        parametrized = parametrize.is_parametrized(module)
        fused = type(module).__base__ if parametrized else type(module)
        if fused not in TORCH:
            continue
        if owns_forward(module):
            owners.append(name)
            continue
        if "replaced_class" in module.__dict__:
            original = module.__dict__.pop("replaced_class")
            del module.inplace
        else:
            original = TORCH[fused]
        module.__class__ = rebased(type(module), original) if parametrized else original
    warn_of_owners("restore_activations", owners)
    return model
