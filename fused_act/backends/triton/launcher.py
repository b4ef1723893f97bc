"""Launches what Triton compiled, without binding and checking the arguments again at each call.

`kernel[grid](*arguments)` derives from all arguments which of its compiled kernels to take, and
that costs the host more than the launch itself. A `Launcher` derives it from the few facts that can
change between its calls. Its first call for such facts goes through `kernel[grid]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fused_act.dispatch import older

# How to call what is compiled is the same in all versions from 3.6 to 3.9. Newer ones are launched
# by `kernel[grid]` until somebody has compared them; see tests/test_triton_launch.py.
IS_KNOWN = older(triton.__version__, (3, 10))
INT32_MAX = 2**31 - 1
# Chains of hooks, which profilers extend; or they put other hooks in the place of a chain.
ENTER_HOOKS = type(knobs.runtime).launch_enter_hook
EXIT_HOOKS = type(knobs.runtime).launch_exit_hook


class Launcher:
    """Launches one kernel with the same functions and options at each call.

    Args:
        kernel: a kernel whose parameters are tensors, sizes and tuples of floats, in any order,
            then `functions`, then constants.
        functions: functions that the kernel takes as constexpr.
        options: the launch options.
    """

    def __init__(
        self, kernel: triton.JITFunction, functions: Sequence[Any], options: dict[str, int]
    ) -> None:
        self.kernel = kernel
        self.functions = functions
        self.options = options
        self.compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, blocks: int, arguments: tuple[Any, ...], constants: tuple[int, ...]) -> None:
        """Launch the kernel on the device of the first argument, a tensor.

        Args:
            blocks: the number of programs.
            arguments: tensors on one device or None, integers that are not negative, and tuples of
                floats.
            constants: integers that the kernel takes as constexpr.
        """
        device = arguments[0].get_device()
        # All that Triton distinguishes: see `native_specialize_impl` there. Floats are all alike.
        key: list[Any] = [device, *constants]
        values = []
        for value in arguments:
            kind = type(value)
            if kind is int:
                key.append(value == 1 or (value % 16 == 0, value > INT32_MAX))
            elif value is None:
                key.append(None)
            elif kind is not tuple:
                key.append(value.dtype)
                value = value.data_ptr()
                key.append(value % 16 == 0)
            values.append(value)
        kind_of_call = tuple(key)
        is_plain = self.is_plain()
        compiled = self.compiled.get(kind_of_call) if is_plain else None
        if compiled is None:
            with torch.cuda.device_of(arguments[0]):
                launched = self.kernel[(blocks,)](
                    *arguments, *self.functions, *constants, **self.options
                )
            if is_plain and IS_KNOWN and isinstance(launched, CompiledKernel):
                self.compiled[kind_of_call] = launched
            return
        active = driver.active
        if device != active.get_current_device():
            with torch.cuda.device_of(arguments[0]):
                return self(blocks, arguments, constants)
        compiled.run(
            blocks,
            1,
            1,
            active.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *values,
            *self.functions,
            *constants,
        )

    def is_plain(self) -> bool:
        """Whether a launch calls no hook, and compiles as it does where no knob is set."""
        runtime = knobs.runtime
        return not (
            ENTER_HOOKS.calls
            or EXIT_HOOKS.calls
            or runtime.launch_enter_hook is not ENTER_HOOKS
            or runtime.launch_exit_hook is not EXIT_HOOKS
            or self.kernel.pre_run_hooks
            or runtime.debug
            or runtime.add_stages_inspection_hook
            or knobs.compilation.instrumentation_mode
        )
