"""The activations, a file each. What is listed here gets ops, tests and benchmarks by itself."""

from fused_act.activations.crelu import CRELU
from fused_act.activations.leaky_relu import LEAKY_RELU
from fused_act.activations.mish import MISH
from fused_act.activations.prelu import PRELU
from fused_act.activations.relu import RELU
from fused_act.activations.relu6 import RELU6
from fused_act.activations.selu import SELU_ROW
from fused_act.activations.sigmoid import SIGMOID
from fused_act.activations.swish import LEARNABLE_SWISH, SWISH
from fused_act.activations.tanh import TANH

ACTIVATIONS = (MISH, SWISH, RELU6, SIGMOID, TANH, RELU, LEAKY_RELU, SELU_ROW)

# Those with a learnable weight.
WEIGHTED = (PRELU, LEARNABLE_SWISH)

# Those of x and of -x, side by side.
MIRRORED = (CRELU,)
