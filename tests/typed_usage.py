"""Every public name in use. mypy must accept it, and refuse the lines that are marked."""

import torch
from torch import Tensor, nn

import fused_act

x = torch.randn(3, requires_grad=True)

outputs: list[Tensor] = [
    fused_act.mish(x),
    fused_act.silu(x, inplace=False),
    fused_act.swish(x, beta=1.702),
    fused_act.relu6(x),
    fused_act.sigmoid(x),
    fused_act.tanh(x, inplace=False),
    fused_act.relu(x),
    fused_act.leaky_relu(x, negative_slope=0.2),
    fused_act.selu(x),
    fused_act.MishFunction.apply(x),
    fused_act.SwishFunction.apply(x, 1.702),
    fused_act.ReLU6Function.apply(x),
]
fused_act.mish([1.0])  # type: ignore[arg-type]
fused_act.swish(x, "1.702")  # type: ignore[arg-type]

modules: list[nn.Module] = [
    fused_act.Mish(inplace=True),
    fused_act.SiLU(),
    fused_act.ReLU6(),
    fused_act.Sigmoid(),
    fused_act.Tanh(),
    fused_act.ReLU(inplace=True),
    fused_act.LeakyReLU(0.2, inplace=True),
    fused_act.SELU(),
    fused_act.CReLU(dim=1),
    fused_act.Swish(beta=1.702, inplace=True),
]
beta: float | nn.Parameter = fused_act.Swish().beta
fused_act.Swish(beta=None)  # type: ignore[arg-type]

model: nn.Sequential = fused_act.replace_activations(nn.Sequential(nn.Mish()))
model = fused_act.replace_activations(model, filter_fn=lambda name, module: "act" in name)
model = fused_act.restore_activations(model)
fused_act.replace_activations(nn.Mish)  # type: ignore[type-var]

names: tuple[str, ...] = fused_act.available_backends()
with fused_act.use_backend("torch") as setting:
    assert isinstance(setting, fused_act.use_backend)
fused_act.use_backend(None)  # type: ignore[arg-type]

version: str = fused_act.__version__
