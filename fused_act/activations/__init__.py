"""The activations, a file each. What is listed here gets ops, tests and benchmarks by itself."""

from fused_act.activations import (
    crelu,
    leaky_relu,
    mish,
    prelu,
    relu,
    relu6,
    selu,
    sigmoid,
    swish,
    tanh,
)

# The only list of activations, by the family whose modules they go through.
FAMILIES = {
    "elementwise": (
        mish.ROW,
        swish.ROW,
        relu6.ROW,
        sigmoid.ROW,
        tanh.ROW,
        relu.ROW,
        leaky_relu.ROW,
        selu.ROW,
    ),
    "weighted": (prelu.ROW, swish.LEARNABLE_ROW),
    "mirrored": (crelu.ROW,),
}
ROWS = {row.name: row for rows in FAMILIES.values() for row in rows}
