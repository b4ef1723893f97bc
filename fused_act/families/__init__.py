"""What rows of one kind share: a module a family, on top of `base` and `raw_op`.

A family has the same name here, in `fused_act.backends.triton` and in csrc/.
"""
