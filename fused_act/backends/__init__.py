"""The backends, in the order of preference of `auto`."""

from fused_act import dispatch
from fused_act.backends import cuda, eager, triton

dispatch.register(cuda.BACKEND, triton.BACKEND, eager.BACKEND)
