"""Which activations a model has."""

from torch import nn


def activations(model: nn.Module) -> list[nn.Module]:
    """The modules of ours."""
    return [m for m in model.modules() if type(m).__module__.startswith("fused_act.")]


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]
