"""The activations, a file each. What is listed here gets ops, tests and benchmarks by itself."""

from fused_act.activations.mish import MISH
from fused_act.activations.relu6 import RELU6
from fused_act.activations.swish import SWISH

ACTIVATIONS = (MISH, SWISH, RELU6)
