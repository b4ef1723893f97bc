"""The networks whose training and inference `python -m benchmarks networks` measures.

Each is built with torch's own activations, as its users build it. The large ones come from
torchvision, timm and transformers, and take part where those are installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import small_networks
from benchmarks.memory import IMAGES, ON_GPU, TOKENS
from benchmarks.providers import DEVICE, error_text


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, and the batch that it gets.

    Args:
        build: makes it.
        block: the name of the class whose instances a user would checkpoint.
        classes: how many there are to tell apart: of images, or of the token that follows.
        on_gpu, on_cpu: the shape of a batch: images and channels_last, or else tokens.
        has_ids: its tokens are ids below `classes`, and not vectors.
        package: what has to be installed for it; "" for ours, which are small.
    """

    build: Callable[[], nn.Module]
    block: str
    classes: int
    on_gpu: tuple[int, ...]
    on_cpu: tuple[int, ...]
    has_ids: bool = False
    package: str = ""

    def unavailable(self) -> str | None:
        """Why it cannot be built here, or None if it can."""
        if self.package:
            try:
                importlib.import_module(self.package)
            except Exception as error:  # a package may raise anything where it does not fit
                return f"{self.package} is needed: {error_text(error)}"
        return None

    def shape(self) -> tuple[int, ...]:
        return self.on_gpu if ON_GPU else self.on_cpu

    def unit(self) -> str:
        return "images" if len(self.shape()) == 4 else "tokens"

    def units(self) -> int:
        """The images or tokens of a batch."""
        shape = self.shape()
        return shape[0] if self.unit() == "images" else math.prod(shape[:2])

    def made(self) -> nn.Module:
        """The network on the device, with the same weights each time."""
        torch.manual_seed(0)
        with torch.device(DEVICE):
            network = self.build()
        if self.unit() == "images":
            network = network.to(memory_format=torch.channels_last)
        return network.to(DEVICE)

    def batch(self) -> tuple[Tensor, Tensor]:
        """What goes in, and the class of each image, or of each token, that should come out."""
        generator, shape = torch.Generator().manual_seed(1), self.shape()
        which = partial(torch.randint, self.classes, generator=generator)
        inputs = which(size=shape) if self.has_ids else torch.randn(shape, generator=generator)
        if self.unit() == "images":
            inputs = inputs.to(memory_format=torch.channels_last)
        targets = which(size=shape[: 1 if self.unit() == "images" else 2])
        return inputs.to(DEVICE), targets.to(DEVICE)

    def made_and_batch(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """Both, and the norms of the network have met the batch."""
        network, batch = self.made(), self.batch()
        meet(network, few(batch)[0])
        return network, batch


def few(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The first samples of a batch, enough to see what a network computes: images, or tokens."""
    if batch[0].dim() == 4:
        return batch[0][:4], batch[1][:4]
    return batch[0][:1, :64], batch[1][:1, :64]


def batch_norms(network: nn.Module) -> list[nn.Module]:
    return [each for each in network.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def meet(network: nn.Module, inputs: Tensor) -> None:
    """Give batch norms the statistics of `inputs`, as training would.

    With those that they begin with, values shrink from layer to layer, and what inference computes
    hardly depends on the activations.
    """
    norms = batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        network.train()(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class LogitsAlone(nn.Module):
    """A language model of transformers whose output is a tensor, the scores of what follows."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def of_torchvision(name: str) -> nn.Module:
    return getattr(importlib.import_module("torchvision.models"), name)()


def resnet50_with_mish() -> nn.Module:
    """Out of place: torch's Mish copies its input before it writes in place, as it saves it."""
    network = of_torchvision("resnet50")
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.ReLU:
                setattr(module, name, nn.Mish())
    return network


def cspdarknet53() -> nn.Module:
    return importlib.import_module("timm").create_model("cspdarknet53", act_layer=nn.Mish)


# The dimensions of the Llama; a test makes it smaller.
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}


def llama() -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(**LLAMA, hidden_act="silu", use_cache=False)
    return LogitsAlone(transformers.LlamaForCausalLM(config))


IMAGENET = (2, 3, 224, 224)  # what a CPU computes in seconds
MOBILENET_V2 = Network(
    partial(of_torchvision, "mobilenet_v2"),
    block="InvertedResidual",
    classes=1000,
    on_gpu=(256, 3, 224, 224),
    on_cpu=IMAGENET,
    package="torchvision",
)

# By the names that the first results have. The network that waits for the host most comes first,
# since a profiler may slow the host after the first profile. Then come those that matter most.
NETWORKS = {
    "mobilenet_v2 bs8": dataclasses.replace(MOBILENET_V2, on_gpu=(8, 3, 224, 224)),
    "mobilenet_v2 relu6": MOBILENET_V2,
    "resnet50 mish": Network(
        resnet50_with_mish,
        block="Bottleneck",
        classes=1000,
        on_gpu=(128, 3, 224, 224),
        on_cpu=IMAGENET,
        package="torchvision",
    ),
    "efficientnet_b0 silu": Network(
        partial(of_torchvision, "efficientnet_b0"),
        block="MBConv",
        classes=1000,
        on_gpu=(128, 3, 224, 224),
        on_cpu=IMAGENET,
        package="torchvision",
    ),
    "llama 4x2048 silu": Network(
        llama,
        block="LlamaDecoderLayer",
        classes=LLAMA["vocab_size"],
        on_gpu=(8, 2048),
        on_cpu=(1, 32),
        has_ids=True,
        package="transformers",
    ),
    "csp mish": Network(
        partial(small_networks.csp_network, nn.Mish, channels=3, classes=1000),
        block="CrossStagePartial",
        classes=1000,
        on_gpu=(128, 3, 224, 224),
        on_cpu=IMAGENET,
    ),
    "cspdarknet53 mish": Network(
        cspdarknet53,
        block="CrossStage",
        classes=1000,
        on_gpu=(64, 3, 256, 256),
        on_cpu=(2, 3, 256, 256),
        package="timm",
    ),
    "small mobilenet_v2 relu6": Network(
        partial(small_networks.digits_network, nn.ReLU6), "InvertedResidual", 10, IMAGES, IMAGES
    ),
    "small csp mish": Network(
        partial(small_networks.csp_network, nn.Mish), "CrossStagePartial", 10, IMAGES, IMAGES
    ),
    "small efficientnet silu": Network(
        partial(small_networks.efficientnet, nn.SiLU), "MBConv", 10, IMAGES, IMAGES
    ),
    "small swiglu silu": Network(
        partial(small_networks.swiglu_mlp, nn.SiLU), "SwiGLU", 64, TOKENS, TOKENS
    ),
}
SMALL = [name for name in NETWORKS if name.startswith("small ")]
# With batches of 8 the host bounds a network, which large batches of small ones do not show.
QUICK = ["mobilenet_v2 bs8", *SMALL] if ON_GPU else SMALL
DEFAULT = list(NETWORKS) if ON_GPU else SMALL
# To compile all networks takes more than four minutes on a GPU.
LARGE = ["mobilenet_v2 relu6", "resnet50 mish", "efficientnet_b0 silu", "llama 4x2048 silu"]
COMPILED = LARGE if ON_GPU else SMALL
