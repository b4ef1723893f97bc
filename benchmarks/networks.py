"""The network that the demo trains: MobileNetV2 for images of 8 x 8 pixels."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter each channel, project (Sandler et al., arXiv:1801.04381).

    The activations sit where the tensors are widest, so that what they save for backward counts;
    the projection has none, as it would lose information in the narrow layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        activation: type[nn.Module],
    ):
        super().__init__()
        channels = expansion * in_channels
        self.is_residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            OrderedDict(
                expand=nn.Conv2d(in_channels, channels, 1, bias=False),
                expand_norm=nn.BatchNorm2d(channels),
                expand_activation=activation(),
                depthwise=nn.Conv2d(
                    channels, channels, 3, stride, padding=1, groups=channels, bias=False
                ),
                depthwise_norm=nn.BatchNorm2d(channels),
                depthwise_activation=activation(),
                project=nn.Conv2d(channels, out_channels, 1, bias=False),
                project_norm=nn.BatchNorm2d(out_channels),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


def digits_network(activation: type[nn.Module]) -> nn.Sequential:
    """A MobileNetV2 of three blocks for one-channel images of the ten digits.

    Args:
        activation: the class of all its activations, called without arguments.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        activation(),
        InvertedResidual(16, 24, stride=2, expansion=4, activation=activation),
        InvertedResidual(24, 24, stride=1, expansion=4, activation=activation),
        InvertedResidual(24, 32, stride=2, expansion=4, activation=activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
