"""Small networks of the kinds that the activations are made for, for one-channel images."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter each channel, project (Sandler et al., arXiv:1801.04381).

    The activations sit where the tensors are widest, so that what they save for backward counts;
    the projection has none, as it would lose information in the narrow layer. Before an activation
    that makes two channels of one there are half of the filters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        activation: Callable[[], nn.Module],
        widens: int = 1,
    ):
        super().__init__()
        channels = expansion * in_channels
        filters = channels // widens
        self.is_residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            OrderedDict(
                expand=nn.Conv2d(in_channels, filters, 1, bias=False),
                expand_norm=nn.BatchNorm2d(filters),
                expand_activation=activation(),
                depthwise=nn.Conv2d(
                    channels, filters, 3, stride, padding=1, groups=filters, bias=False
                ),
                depthwise_norm=nn.BatchNorm2d(filters),
                depthwise_activation=activation(),
                project=nn.Conv2d(channels, out_channels, 1, bias=False),
                project_norm=nn.BatchNorm2d(out_channels),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


def digits_network(activation: Callable[[], nn.Module], widens: int = 1) -> nn.Sequential:
    """A MobileNetV2 of three blocks for one-channel images of the ten digits.

    Args:
        activation: makes each of its activations; the class of one will do.
        widens: the channels that it makes of one: 2 for CReLU.
    """
    block = functools.partial(InvertedResidual, expansion=4, activation=activation, widens=widens)
    return nn.Sequential(
        nn.Conv2d(1, 16 // widens, 3, padding=1, bias=False),
        nn.BatchNorm2d(16 // widens),
        activation(),
        block(16, 24, stride=2),
        block(24, 24, stride=1),
        block(24, 32, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    activation: Callable[[], nn.Module],
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        activation(),
    )


class Residual(nn.Module):
    """Darknet's block, a residual of two convolutions (Redmon and Farhadi, arXiv:1804.02767)."""

    def __init__(self, channels: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(channels, channels, 1, activation),
            convolution(channels, channels, 3, activation),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class CrossStagePartial(nn.Module):
    """CSPNet's stage: half of the channels pass by the blocks (Wang et al., arXiv:1911.11929)."""

    def __init__(self, channels: int, blocks: int, activation: Callable[[], nn.Module]):
        super().__init__()
        half = channels // 2
        self.passing = convolution(channels, half, 1, activation)
        self.through = nn.Sequential(
            convolution(channels, half, 1, activation),
            *(Residual(half, activation) for _ in range(blocks)),
        )
        self.transition = convolution(channels, channels, 1, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(torch.cat([self.through(x), self.passing(x)], dim=1))


def csp_network(
    activation: Callable[[], nn.Module], channels: int = 1, classes: int = 10
) -> nn.Sequential:
    """Two stages of YOLOv4's backbone, which has Mish (Bochkovskiy et al., arXiv:2004.10934).

    Args:
        channels: those of its images.
        classes: how many kinds of images it tells apart.
    """
    return nn.Sequential(
        convolution(channels, 16, 3, activation),
        convolution(16, 32, 3, activation, stride=2),
        CrossStagePartial(32, 1, activation),
        convolution(32, 64, 3, activation, stride=2),
        CrossStagePartial(64, 2, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


class SqueezeExcitation(nn.Module):
    """A weight for each channel, from all of the image (Hu et al., arXiv:1709.01507)."""

    def __init__(self, channels: int, reduced: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.weights = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, reduced, 1),
            activation(),
            nn.Conv2d(reduced, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class MBConv(nn.Module):
    """EfficientNet's block (Tan and Le, arXiv:1905.11946): MobileNetV2's with such weights."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation):
        super().__init__()
        channels = 4 * in_channels
        self.is_residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            convolution(in_channels, channels, 1, activation),
            convolution(channels, channels, 3, activation, stride, groups=channels),
            SqueezeExcitation(channels, in_channels // 4, activation),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


def efficientnet(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        convolution(1, 16, 3, activation, stride=2),
        MBConv(16, 24, 1, activation),
        MBConv(24, 24, 1, activation),
        MBConv(24, 32, 2, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class SwiGLU(nn.Module):
    """A transformer's MLP, gated (Shazeer, arXiv:2002.05202), behind its norm."""

    def __init__(self, features: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.gate = nn.Linear(features, 4 * features, bias=False)
        self.up = nn.Linear(features, 4 * features, bias=False)
        self.down = nn.Linear(4 * features, features, bias=False)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        normalized = self.norm(x)
        return x + self.down(self.activation(self.gate(normalized)) * self.up(normalized))


def swiglu_mlp(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Three of them, for tokens of 64 features."""
    return nn.Sequential(*(SwiGLU(64, activation) for _ in range(3)))


def stack(activation: Callable[[], nn.Module], widens: int = 1, *, norm: bool) -> nn.Sequential:
    """Six convolutions with an activation each, with or without a norm in between."""
    blocks, channels, filters = [], 1, 16 // widens
    for _ in range(6):
        layers = [nn.Conv2d(channels, filters, 3, padding=1, bias=not norm)]
        layers += [nn.BatchNorm2d(filters), activation()] if norm else [activation()]
        blocks.append(nn.Sequential(*layers))
        channels = 16
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
