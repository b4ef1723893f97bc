"""Swap a model's activation modules for fused ones, and back.

The module object stays; only its class changes. So its hooks, its name, its training flag and every
other reference to it hold, and nothing else in the model is touched.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_act.activations.leaky_relu import LARGEST_SLOPE, LeakyReLU
from fused_act.activations.mish import Mish
from fused_act.activations.prelu import PReLU
from fused_act.activations.relu import ReLU
from fused_act.activations.relu6 import ReLU6
from fused_act.activations.selu import SELU
from fused_act.activations.sigmoid import Sigmoid
from fused_act.activations.swish import SiLU
from fused_act.activations.tanh import Tanh
from fused_act.families.base import as_float

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
# By name, since a package that is imported again has other classes of the same names.
TORCH = {(fused.__module__, fused.__qualname__): original for original, fused in FUSED.items()}
# Where activations are defined, whether there is a fused one or not.
DEFINED_IN = ("torch.nn.modules.activation", "transformers.activations")


class Replacement(NamedTuple):
    """What `replace_activations` did with one activation; printed, it is a sentence.

    Attributes:
        name: that of the module, as in `model.named_modules()`.
        original: the class that it had.
        fused: the class that it has now, or None if it was left as it is.
        reason: why it was left, or "".
    """

    name: str
    original: type[nn.Module]
    fused: type[nn.Module] | None
    reason: str

    def __str__(self) -> str:
        what = f"{self.name or 'the model itself'}: {self.original.__name__}"
        if self.fused is None:
            return f"{what} is left as it is: {self.reason}"
        return f"{what} is now {self.fused.__module__.partition('.')[0]}.{self.fused.__name__}"


class Restoration(NamedTuple):
    """A module that has torch's class now, and what it takes to give it back ours."""

    module: nn.Module
    fused: type[nn.Module]
    original: type[nn.Module]
    attributes: dict[str, object]

    def undo(self) -> None:
        """Give the module the very class that it had, unless it has got another one since."""
        now, before, during = type(self.module), self.fused, self.original
        if now is not during:
            # A module has a new class each time that it is parametrized, so the bases are compared.
            if original_of(before) is None:
                before, during = before.__mro__[1], during.__mro__[1]
            if parametrize.is_parametrized(self.module):
                now, before = now.__mro__[1], rebased(now, before)
            if now is not during:
                return
        self.module.__class__ = before
        vars(self.module).update(self.attributes)


def original_of(kind: type[nn.Module] | None) -> type[nn.Module] | None:
    """torch's class, where `kind` is one of ours."""
    return None if kind is None else TORCH.get((kind.__module__, kind.__qualname__))


def fused_class(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The fused class for `module`, or None and why there is none; "" of what is no activation.

    By exact type, since a subclass may compute something else.
    """
    kind = type(module)
    fused = FUSED.get(kind)
    transformers = sys.modules.get("transformers.activations")
    if transformers is not None:
        if kind is getattr(transformers, "SiLUActivation", None):
            fused = SiLU
        if kind is getattr(transformers, "MishActivation", None):
            fused = Mish
    if fused is None:
        base = kind.__base__ if parametrize.is_parametrized(module) else kind
        if original_of(base) is not None or kind.__module__.partition(".")[0] == "fused_act":
            return None, "it is fused already"
        if base in FUSED:
            return None, "it is parametrized"
        if isinstance(module, tuple(FUSED)):
            return None, "it is a subclass, which may compute something else"
        other = kind.__module__ in DEFINED_IN and kind is not nn.MultiheadAttention
        return None, "there is no fused one" if other else ""
    if type(module) is nn.ReLU6 and (module.min_val, module.max_val) != (0.0, 6.0):
        return None, f"its bounds are {module.min_val} and {module.max_val}, and not 0 and 6"
    if kind is nn.LeakyReLU and not takes_slope(module.negative_slope):
        return None, f"its slope is {module.negative_slope!r}, which is no finite number"
    return fused, ""


def takes_slope(slope: object) -> bool:
    """Whether ours takes it; what torch takes besides, such as infinity, stays with torch."""
    if isinstance(slope, (bool, Tensor)):
        return True
    try:
        as_float("leaky_relu", "negative_slope", slope, LARGEST_SLOPE)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def owns_forward(module: nn.Module) -> bool:
    """Whether the module itself holds a `forward`, which runs whatever its class is."""
    return "forward" in vars(module)


def warn_of_owners(function: str, names: list[str], stacklevel: int = 3) -> None:
    if names:
        found = ", ".join(repr(name) if name else "the model itself" for name in names)
        warnings.warn(
            f"{function}: these modules are left as they are, since each holds a `forward` of its "
            f"own, which would run whatever its class is: {found}. Remove the hook or the patch "
            "that put it there, and where one is left, `del module.forward`; then call again",
            stacklevel=stacklevel,
        )


def rebased(parametrized: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class that `register_parametrization` would have made of `base`."""
    members = {k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__")}
    metaclass: Callable[..., type[nn.Module]] = type(parametrized)
    return metaclass(parametrized.__name__, (base,), members)


def replace_activations(
    model: Model,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    *,
    report: Callable[[Replacement], object] | None = None,
) -> Model:
    """Make torch's activation modules in `model` fused ones, in place.

    These are `Mish`, `SiLU`, `ReLU6`, `Sigmoid`, `Tanh`, `ReLU`, `LeakyReLU`, `SELU` and `PReLU`,
    and transformers' `SiLUActivation` and `MishActivation`. Modules are matched by exact type and
    keep their `inplace`; parameters, buffers and `state_dict` stay as they are.

    A module that holds a `forward` of its own (a hook of accelerate, a kernel of Hugging Face or a
    monkeypatch has put it there; accelerate#1971, Liger-Kernel#593) would run that one all the
    same. It is left as it is, and one warning lists the names of all such modules.

    A module that several models share is fused in all of them: `copy.deepcopy` the model first. A
    library that looks up the exact class of a module does not know ours, see `restored`.

    Args:
        model: any module, an activation itself included.
        filter_fn: `filter_fn(name, module)`, with the name as in `model.named_modules()` (that is
            the first, for a module that has several); only modules for which it returns true are
            replaced. None replaces all.
        report: is called with a `Replacement` for each activation, replaced or left, which says
            why: `report=print`, or `report=found.append`.

    Returns:
        `model`.
    """
    owners = []
    for name, module in model.named_modules():
        original = type(module)
        fused, reason = fused_class(module)
        if fused is not None and filter_fn is not None and not filter_fn(name, module):
            fused, reason = None, "filter_fn leaves it out"
        elif fused is not None and owns_forward(module):
            fused, reason = None, "it holds a `forward` of its own"
            owners.append(name)
        if fused is not None:
            if original not in FUSED:
                module.replaced_class = original
                module.inplace = False
            module.__class__ = fused
        if report is not None and (fused or reason):
            report(Replacement(name, original, fused, reason))
    warn_of_owners("replace_activations", owners)
    return model


def restore(model: nn.Module) -> tuple[list[Restoration], list[str]]:
    """What was restored, and the names of modules that hold a `forward` of their own."""
    done, owners = [], []
    for name, module in model.named_modules():
        kind = type(module)
        parametrized = parametrize.is_parametrized(module)
        original = original_of(kind.__base__ if parametrized else kind)
        if original is None:
            continue
        if owns_forward(module):
            owners.append(name)
            continue
        attributes = {}
        if "replaced_class" in vars(module):
            attributes = {key: vars(module).pop(key) for key in ("replaced_class", "inplace")}
            original = attributes["replaced_class"]
        module.__class__ = rebased(kind, original) if parametrized else original
        done.append(Restoration(module, kind, type(module), attributes))
    return done, owners


def restore_activations(model: Model) -> Model:
    """The inverse of `replace_activations`: make the fused modules in `model` torch's, in place.

    Not `Swish`, of which torch has none. One that was parametrized in the meantime stays so, on
    torch's class (MQBench#57). Other subclasses of the fused classes stay what they are. A module
    that holds a `forward` of its own is left as it is, as in `replace_activations`: what a hook has
    wrapped is the fused `forward`.

    Returns:
        `model`.
    """
    _, owners = restore(model)
    warn_of_owners("restore_activations", owners)
    return model


@contextlib.contextmanager
def restored(model: Model) -> Iterator[Model]:
    """Within the block the fused modules in `model` have torch's classes, and ours after it.

    For libraries that look up the exact class of a module and do not know a subclass: those that
    explain (captum's DeepLift gave other attributions in silence), quantize (`fuse_modules`
    raises), count operations (thop counts less) or trace (names in an FX graph get longer). What
    such a library makes of the model, a graph or a quantized copy, keeps torch's classes.

    After the block, and also where it raises, each module has the very class that it had before.
    One that got another class in the block keeps that; one that was parametrized there, or is no
    longer, is so on our class. Modules that hold a `forward` of their own when the block begins are
    left as they are, as in `restore_activations`.

    Returns:
        A context manager that gives `model`.

    Example::

        with fused_act.restored(model):
            attributions = captum.attr.DeepLift(model).attribute(x, target=0)
    """
    done, owners = restore(model)
    try:
        warn_of_owners("restored", owners, stacklevel=4)
        yield model
    finally:
        for restoration in done:
            restoration.undo()
