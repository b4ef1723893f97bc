"""What tests and benchmarks must know of each activation and cannot find out: a row each.

Benchmarks import this, so it needs torch alone: a `definition` is given mpmath.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_act
from fused_act.activations import ROWS, swish
from fused_act.activations.selu import ALPHA, SCALE
from fused_act.families.base import Row


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """One activation. Functions of `x` take the parameters behind it, or the weight.

    Args:
        name: that of its row.
        title: that of its module, or what pictures call it.
        paper: authors, year and where to find it.
        function: ours. What works in place takes `inplace`.
        torch_function: torch's own in its place, or the definition in torch's ops.
        module, torch_module: make the modules. torch's is the definition where torch has none.
        definition: the function, `definition(mp, x, *parameters)`, in mpmath.
        derivative_definition, weight_derivative_definition: its derivatives in mpmath, of the same
            arguments.
        derivative_definition_from_output: the derivative in mpmath as a function of the output.
        forward, derivative: the same in float64, so that nothing overflows and nothing cancels but
            at the zero of a derivative.
        derivative_from_output: the derivative where the output, rounded, is `y`.
        weight_derivative: with respect to the weight, where there is one.
        defaults: the parameters of benchmarks: torch's defaults, or ours where torch has none.
        parameters: those that all tests run with.
        more_parameters: those with which the accuracy is tested, too.
        weights: those with which the accuracy of an activation with a weight is tested.
        exponent: what the exponential gets, up to its sign. Below -87 it is no normal number.
        root: the zero of the derivative, in `exponent`. There an error in ULPs says nothing.
        budgets: instructions for an element on sm_90 at most, load, store and conversion included,
            by backend and bits, in the order of `kernels.VARIANTS`. Memory speed on an H200
            allows 31 for a kernel that moves 4 bytes and 47 for one that moves 6.
        clamps: by direction, the bits of the dtypes whose kernels clamp. They must keep NaN.
        special_functions: those of the GPU (MUFU) that a kernel takes once for an element.
        spills: accesses of a thread to spilled registers in backward, at most, by backend and
            whether columns have the weights. An H200 took longer without them, for fewer threads go
            with that (benchmarks/TUNING.md).
        aten_symbols: ATen's kernels in C++, forward and backward. ReLU's backward is one of a
            template that serves other ops, too, and left out.
        aten_out: torch's op that writes into an output, `aten_out(x, *parameters, out=y)`.
        naive: what papers and model files write, with the defaults. Each operation is a
            kernel and saves what its gradient needs.
        flag_gems: the names of FlagGems' ops, forward and backward, if there are any.
        shape: kinks, range, whether it is monotonic, the mean of its output for standard normal
            input, and where it saturates; to test the comparison sheet against.
    """

    name: str
    title: str
    paper: str
    function: Callable[..., Tensor]
    torch_function: Callable[..., Tensor]
    module: Callable[..., nn.Module]
    torch_module: Callable[..., nn.Module]
    definition: Callable
    derivative_definition: Callable | None = None
    derivative_definition_from_output: Callable | None = None
    weight_derivative_definition: Callable | None = None
    forward: Callable[..., Tensor]
    derivative: Callable[..., Tensor] | None = None
    derivative_from_output: Callable[..., Tensor] | None = None
    weight_derivative: Callable[..., Tensor] | None = None
    defaults: tuple[float, ...] = ()
    parameters: tuple[tuple[float, ...], ...] = ((),)
    more_parameters: tuple[tuple[float, ...], ...] = ()
    weights: tuple[float, ...] = ()
    exponent: Callable[..., Tensor] = lambda x, *parameters: x
    root: float | None = None
    budgets: dict[tuple[str, int], tuple[float, ...]]
    clamps: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    special_functions: tuple[str, ...] = ()
    spills: dict[tuple[str, bool], int] = dataclasses.field(default_factory=dict)
    aten_symbols: tuple[str, str] | None = None
    aten_out: Callable[..., Tensor] | None = None
    naive: Callable[..., Tensor] | None = None
    flag_gems: tuple[str, str] = ("", "")
    shape: tuple[str, str, str, str, str] | None = None

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @property
    def saved_unit(self) -> str:
        """What the kernels save for backward for an element of the output: x, y or bits."""
        saved = self.row.Function.saves
        return "bits" if saved == "mask" else saved

    @property
    def widens(self) -> int:
        """The channels that it makes of one."""
        return 2 if self.row.family == "mirrored" else 1


def mish_derivative(x: Tensor) -> Tensor:
    clamped = x.clamp(max=40.0)  # above, tanh(softplus(x)) is 1 in float64
    e = torch.exp(clamped)
    n = e * (e + 2)
    return (n + 4 * clamped * (e * (e + 1)) / (n + 2)) / (n + 2)


def mish_forward(x: Tensor) -> Tensor:
    e = torch.exp(x.clamp(max=40.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def mish_derivative_definition(mp: ModuleType, x):
    tanh = mp.tanh(mp.log1p(mp.exp(x)))
    return tanh + x * (1 - tanh**2) * sigmoid(mp, x)


def sigmoid(mp: ModuleType, x):
    return 1 / (1 + mp.exp(-x))


def torch_swish(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    """torch has no Swish: SiLU where beta is 1, else the definition."""
    if beta == 1.0:
        return F.silu(x, inplace=inplace)
    gate = torch.sigmoid(beta * x)
    return x.mul_(gate) if inplace else x * gate


def swish_derivative(x: Tensor, beta: float | Tensor) -> Tensor:
    z = (beta * x).clamp(-700.0, 700.0)
    return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))


def swish_derivative_definition(mp: ModuleType, x, beta):
    gate = sigmoid(mp, beta * x)
    return gate + beta * x * gate * (1 - gate)


def swish_weight_derivative(x: Tensor, beta: Tensor) -> Tensor:
    """x^2 sigmoid(beta x) sigmoid(-beta x), a factor at a time: the square may overflow."""
    h = torch.exp(-(beta * x).abs() / 2)
    u = x * h / (1 + h * h)
    return u * u


def swish_weight_derivative_definition(mp: ModuleType, x, beta):
    return x**2 * sigmoid(mp, beta * x) * sigmoid(mp, -beta * x)


class TorchSwish(nn.Module):
    """What people write for a learnable Swish."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(self.beta * input)


def torch_crelu(x: Tensor, dim: int = 1) -> Tensor:
    return torch.cat([F.relu(x), F.relu(-x)], dim)


class TorchCReLU(nn.Module):
    """What people write: two activations and a copy of both."""

    def forward(self, input: Tensor) -> Tensor:
        return torch_crelu(input)


def selu_constants(mp: ModuleType):
    """For the fixed point of mean 0 and variance 1: Klambauer et al., arXiv:1706.02515."""
    root_e = mp.sqrt(mp.e)
    erfc1, erfc2 = mp.erfc(1 / mp.sqrt(2)), mp.erfc(mp.sqrt(2))
    alpha = -mp.sqrt(2 / mp.pi) / (erfc1 * root_e - 1)
    scale = (1 - erfc1 * root_e) * mp.sqrt(2 * mp.pi)
    scale /= mp.sqrt(
        2 * erfc2 * mp.e**2 + mp.pi * erfc1**2 * mp.e - 2 * (2 + mp.pi) * erfc1 * root_e + mp.pi + 2
    )
    return alpha, scale


def selu_definition(mp: ModuleType, x):
    alpha, scale = selu_constants(mp)
    return scale * (x if x > 0 else alpha * mp.expm1(x))


def selu_derivative_definition(mp: ModuleType, x):
    alpha, scale = selu_constants(mp)
    return scale * (1 if x > 0 else alpha * mp.exp(x))


def selu_derivative_definition_from_output(mp: ModuleType, y):
    alpha, scale = selu_constants(mp)
    return scale if y > 0 else y + scale * alpha


# Where y + SCALE_ALPHA cancels, its second part counts.
SCALE_ALPHA, SCALE_ALPHA_LOW = 1.7580993408473768599402175208123, 1.4153519380084498e-17

MISH = Facts(
    name="mish",
    title="Mish",
    paper="Misra 2019, arXiv:1908.08681",
    function=fused_act.mish,
    torch_function=F.mish,
    module=fused_act.Mish,
    torch_module=nn.Mish,
    definition=lambda mp, x: x * mp.tanh(mp.log1p(mp.exp(x))),
    derivative_definition=mish_derivative_definition,
    forward=mish_forward,
    derivative=mish_derivative,
    root=-1.1924337,
    budgets={
        ("triton", 16): (13, 19),
        ("triton", 32): (24, 32),
        ("cuda", 16): (14, 20),
        ("cuda", 32): (27, 33),
    },
    clamps={"forward": (16, 32), "backward": (16, 32)},
    special_functions=("EX2", "RCP"),
    aten_symbols=("mish_kernel", "mish_backward_kernel"),
    aten_out=torch.ops.aten.mish.out,
    naive=lambda x: x * torch.tanh(F.softplus(x)),
    flag_gems=("mish", ""),
    shape=("", "-0.31 to ∞", "no", "0.24", "below"),
)

SWISH = Facts(
    name="swish",
    title="Swish",
    paper="Ramachandran et al. 2017, arXiv:1710.05941",
    function=fused_act.swish,
    torch_function=torch_swish,
    module=fused_act.SiLU,
    torch_module=nn.SiLU,
    definition=lambda mp, x, beta: x * sigmoid(mp, beta * x),
    derivative_definition=swish_derivative_definition,
    forward=lambda x, beta: x * torch.sigmoid(beta * x),
    derivative=swish_derivative,
    defaults=(1.0,),
    parameters=((1.0,), (1.702,)),
    # beta * x overflows for the largest and underflows for the smallest; 1e30 is the largest with a
    # formula.
    more_parameters=((-2.0,), (0.5,), (8.0,), (-1e30,), (2.3e38,), (-2.3e38,), (1e-40,)),
    exponent=lambda x, beta: beta * x,
    root=-1.2784645,
    budgets={
        ("triton", 16): (10, 18),
        ("triton", 32): (26, 32),
        ("cuda", 16): (11, 19),
        ("cuda", 32): (28, 34),
    },
    clamps={"forward": (32,), "backward": (16, 32)},
    special_functions=("EX2", "RCP"),
    aten_symbols=("silu_kernel", "silu_backward_kernel"),
    aten_out=lambda x, beta, out: torch.ops.aten.silu.out(x, out=out),
    naive=lambda x: x * torch.sigmoid(x),
    flag_gems=("silu", "silu_backward"),
    shape=("", "-0.28 to ∞", "no", "0.21", "below"),
)

RELU6 = Facts(
    name="relu6",
    title="ReLU6",
    paper="Howard et al. 2017, arXiv:1704.04861",
    function=fused_act.relu6,
    torch_function=F.relu6,
    module=fused_act.ReLU6,
    torch_module=nn.ReLU6,
    definition=lambda mp, x: min(max(x, 0), 6),
    derivative_definition=lambda mp, x: mp.mpf(0 < x < 6),
    forward=lambda x: x.clamp(0.0, 6.0),
    derivative=lambda x: ((x > 0) & (x < 6)).double(),
    budgets={
        ("triton", 16): (11, 11, 5),
        ("triton", 32): (16, 16, 10),
        ("cuda", 16): (11, 11, 7),
        ("cuda", 32): (14.5, 14.5, 11),
    },
    clamps={"forward": (16, 32)},
    aten_symbols=("launch_clamp_scalar", "hardtanh_backward_kernel"),
    aten_out=lambda x, out: torch.ops.aten.hardtanh.out(x, 0.0, 6.0, out=out),
    naive=lambda x: x.clamp(min=0).clamp(max=6),
    flag_gems=("relu6", ""),
    shape=("0 6", "0 to 6", "yes", "0.40", "below and above"),
)

SIGMOID = Facts(
    name="sigmoid",
    title="Sigmoid",
    paper="Rumelhart et al. 1986",
    function=fused_act.sigmoid,
    torch_function=lambda x, inplace=False: torch.sigmoid_(x) if inplace else torch.sigmoid(x),
    module=fused_act.Sigmoid,
    torch_module=nn.Sigmoid,
    definition=sigmoid,
    derivative_definition_from_output=lambda mp, y: y * (1 - y),
    forward=torch.sigmoid,
    derivative_from_output=lambda y: y * (1 - y),
    budgets={
        ("triton", 16): (9, 9),
        ("triton", 32): (18, 7),
        ("cuda", 16): (10, 9),
        ("cuda", 32): (21, 10),
    },
    clamps={"forward": (32,)},
    aten_symbols=("sigmoid_kernel_cuda", "sigmoid_backward_kernel_cuda"),
    aten_out=torch.ops.aten.sigmoid.out,
    naive=lambda x: 1 / (1 + torch.exp(-x)),
)

TANH = Facts(
    name="tanh",
    title="Tanh",
    paper="LeCun et al. 1998",
    function=fused_act.tanh,
    torch_function=lambda x, inplace=False: torch.tanh_(x) if inplace else torch.tanh(x),
    module=fused_act.Tanh,
    torch_module=nn.Tanh,
    definition=lambda mp, x: mp.tanh(x),
    derivative_definition_from_output=lambda mp, y: 1 - y**2,
    forward=torch.tanh,
    derivative_from_output=lambda y: (1 - y) * (1 + y),
    budgets={
        ("triton", 16): (17, 9),
        ("triton", 32): (19, 7),
        ("cuda", 16): (19, 9),
        ("cuda", 32): (23, 10),
    },
    aten_symbols=("tanh_kernel_cuda", "tanh_backward_kernel_cuda"),
    aten_out=torch.ops.aten.tanh.out,
    shape=("", "-1 to 1", "yes", "0.00", "below and above"),
)

RELU = Facts(
    name="relu",
    title="ReLU",
    paper="Nair, Hinton 2010",
    function=fused_act.relu,
    torch_function=F.relu,
    module=fused_act.ReLU,
    torch_module=nn.ReLU,
    definition=lambda mp, x: max(x, mp.mpf(0)),
    derivative_definition=lambda mp, x: mp.mpf(x > 0),
    forward=lambda x: x.clamp(min=0.0),
    derivative=lambda x: (x > 0).double(),
    budgets={
        ("triton", 16): (6, 6, 5),
        ("triton", 32): (14, 14, 10),
        ("cuda", 16): (8, 8, 7),
        ("cuda", 32): (12.5, 12.5, 11),
    },
    clamps={"forward": (16, 32)},
    aten_out=torch.ops.aten.relu.out,
    shape=("0", "0 to ∞", "yes", "0.40", "below"),
)

LEAKY_RELU = Facts(
    name="leaky_relu",
    title="LeakyReLU",
    paper="Maas et al. 2013",
    function=fused_act.leaky_relu,
    torch_function=F.leaky_relu,
    module=fused_act.LeakyReLU,
    torch_module=nn.LeakyReLU,
    definition=lambda mp, x, negative_slope: x if x > 0 else negative_slope * x,
    derivative_definition=lambda mp, x, negative_slope: mp.mpf(1) if x > 0 else negative_slope,
    forward=lambda x, negative_slope: torch.where(x > 0, x, x * negative_slope),
    derivative=lambda x, negative_slope: torch.where(x > 0, 1.0, negative_slope).double(),
    defaults=(0.01,),
    parameters=((0.1,),),
    more_parameters=((0.01,), (-0.5,), (0.0,), (3.0,)),
    budgets={
        ("triton", 16): (8, 8, 7),
        ("triton", 32): (15, 15, 11),
        ("cuda", 16): (9, 9, 7.5),
        ("cuda", 32): (12.5, 12.5, 11.5),
    },
    aten_symbols=("leaky_relu_kernel", "leaky_relu_backward_kernel"),
    aten_out=torch.ops.aten.leaky_relu.out,
    naive=lambda x: torch.where(x > 0, x, 0.01 * x),
    shape=("0", "-∞ to ∞", "yes", "0.39", ""),
)

SELU = Facts(
    name="selu",
    title="SELU",
    paper="Klambauer et al. 2017, arXiv:1706.02515",
    function=fused_act.selu,
    torch_function=F.selu,
    module=fused_act.SELU,
    torch_module=nn.SELU,
    definition=selu_definition,
    derivative_definition=selu_derivative_definition,
    derivative_definition_from_output=selu_derivative_definition_from_output,
    forward=lambda x: torch.where(x > 0, SCALE * x, SCALE_ALPHA * torch.expm1(x)),
    derivative=lambda x: torch.where(x > 0, SCALE, SCALE_ALPHA * torch.exp(x)),
    derivative_from_output=lambda y: torch.where(y > 0, SCALE, (y + SCALE_ALPHA) + SCALE_ALPHA_LOW),
    budgets={
        ("triton", 16): (14, 11, 10),
        ("triton", 32): (19, 21, 10),
        ("cuda", 16): (17, 13, 12),
        ("cuda", 32): (22, 24, 13),
    },
    clamps={"backward": (32,)},
    aten_symbols=("elu_kernel", "elu_backward_kernel"),
    aten_out=lambda x, out: torch.ops.aten.elu.out(x, ALPHA, SCALE, out=out),
    naive=lambda x: SCALE * torch.where(x > 0, x, ALPHA * (torch.exp(x) - 1)),
    shape=("0", "-1.76 to ∞", "yes", "0.00", "below"),
)

PRELU = Facts(
    name="prelu",
    title="PReLU",
    paper="He et al. 2015, arXiv:1502.01852",
    function=fused_act.prelu,
    torch_function=F.prelu,
    module=fused_act.PReLU,
    torch_module=nn.PReLU,
    definition=LEAKY_RELU.definition,
    derivative_definition=LEAKY_RELU.derivative_definition,
    forward=lambda x, weight: torch.where(x > 0, x, x * weight),
    derivative=lambda x, weight: torch.where(x > 0, 1.0, weight).double(),
    weight_derivative=lambda x, weight: torch.where(x > 0, 0.0, x),
    weight_derivative_definition=lambda mp, x, weight: mp.mpf(0) if x > 0 else x,
    weights=(0.25, -0.5, 0.0, 1.0, 3.0),
    budgets={
        ("triton", 16): (12, 16, 13, 18),
        ("triton", 32): (17, 18, 18, 20),
        ("cuda", 16): (8, 17, 9, 19),
        ("cuda", 32): (11, 22, 11, 21),
    },
    spills={("cuda", True): 4, ("cuda", False): 4},
)

LEARNABLE_SWISH = Facts(
    name="learnable_swish",
    title="Swish, learnable",
    paper=SWISH.paper,
    function=fused_act.swish,
    torch_function=swish.torch_learnable,
    module=lambda **options: fused_act.Swish(learnable=True, **options),
    torch_module=TorchSwish,
    definition=SWISH.definition,
    derivative_definition=SWISH.derivative_definition,
    forward=SWISH.forward,
    derivative=SWISH.derivative,
    weight_derivative=swish_weight_derivative,
    weight_derivative_definition=swish_weight_derivative_definition,
    weights=(1.0, -2.0, 0.0, 0.5, 8.0),
    exponent=SWISH.exponent,
    root=SWISH.root,
    budgets={
        ("triton", 16): (16, 32, 17, 35),
        ("triton", 32): (36, 61, 37, 64),
        ("cuda", 16): (13, 32, 14, 35),
        ("cuda", 32): (30, 65, 30, 64),
    },
    spills={("triton", True): 8, ("cuda", True): 24},
)

# Of a mirrored activation `definition` and `forward` are of one half, and the derivative of both.
# Instructions are for an element that is written: forward writes two for one read.
CRELU = Facts(
    name="crelu",
    title="CReLU",
    paper="Shang et al. 2016, arXiv:1603.05201",
    function=fused_act.crelu,
    torch_function=torch_crelu,
    module=fused_act.CReLU,
    torch_module=TorchCReLU,
    definition=RELU.definition,
    derivative_definition=lambda mp, x: mp.sign(x),
    forward=RELU.forward,
    derivative=torch.sign,
    defaults=(1,),
    parameters=((-1,),),
    budgets={
        ("triton", 16): (5, 8, 17),
        ("triton", 32): (7, 16, 25),
        ("cuda", 16): (7, 10, 20),
        ("cuda", 32): (11.5, 18, 34),
    },
    shape=("0", "0 to ∞", "no", "0.40", ""),
)

# In the order of pictures: kinked ones, bounded ones, smooth ones.
ALL = (
    *(RELU, LEAKY_RELU, PRELU, RELU6, CRELU, SELU),
    *(SIGMOID, TANH, SWISH, LEARNABLE_SWISH, MISH),
)
FACTS = {facts.name: facts for facts in ALL}
FEATURED = ("mish", "swish", "relu6")  # what the package is made for
