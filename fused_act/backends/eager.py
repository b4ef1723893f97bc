"""The `torch` backend: torch's own ops, the reference and the fallback for every row.

Results and gradients are torch's, bit for bit.
"""

from fused_act.activations import ROWS
from fused_act.dispatch import Backend

BACKEND = Backend(
    name="torch",
    unavailable=lambda: None,
    load=lambda: {name: row.eager for name, row in ROWS.items()},
    device_types=None,
)
