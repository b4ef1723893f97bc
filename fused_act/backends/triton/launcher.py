"""Launches what Triton compiled, without binding and specializing the arguments at each call.

`kernel[grid](*arguments)` finds out at each call which of its compiled kernels the arguments need,
which takes the host some 20 us, several times as long as the launch itself. A `Launcher` knows what
can differ between its own calls. It keeps what `kernel[grid]` launched at the first call of a kind.
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

# From Triton 3.6 to 3.9 compiled kernels are called with the same arguments. Newer versions launch
# through `kernel[grid]` at each call until tests/test_triton_launch.py has passed with them.
IS_KNOWN = older(triton.__version__, (3, 10))
INT32_MAX = 2**31 - 1
# Chains of hooks on each launch. Profilers add hooks to a chain, or put a hook in its place.
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
        # What Triton specializes on: see `native_specialize_impl` in its runtime/jit.py. It does
        # not specialize on floats.
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
                value = value.data_ptr()  # for an address, Triton does not ask the driver
                key.append(value % 16 == 0)
            values.append(value)
        place = tuple(key)
        is_plain = self.is_plain()
        compiled = self.compiled.get(place) if is_plain else None
        if compiled is None:
            with torch.cuda.device_of(arguments[0]):
                launched = self.kernel[(blocks,)](
                    *arguments, *self.functions, *constants, **self.options
                )
            # In the interpreter nothing is compiled.
            if is_plain and IS_KNOWN and isinstance(launched, CompiledKernel):
                self.compiled[place] = launched
            return
        active = driver.active
        if device != active.get_current_device():
            with torch.cuda.device_of(arguments[0]):
                return self(blocks, arguments, constants)
        stream = active.get_current_stream(device)
        # None stands for the hooks and for what they would be told.
        compiled.run(
            blocks, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *values, *self.functions, *constants
        )  # fmt: skip

    def is_plain(self) -> bool:
        """Whether no hook is on the launch, and no knob is set that changes what it compiles."""
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
