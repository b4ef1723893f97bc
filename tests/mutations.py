"""Seeded bugs, and whether the tests that guard against each of them catch it.

    python -m tests.mutations                  all (`make mutate`), and writes tests/mutations.md
    python -m tests.mutations cuda-tail-bits   this one, with what pytest says; the others stay as
                                               the table has them

Every bug is one replacement in one file, made in a copy of the tree, and only its guards run. They
run without it first: a guard that fails anyway, or that runs no test, proves nothing. A bug is
caught if a test fails or takes the process down; one that hangs, that does not build or that makes
a fixture fail is not, since none of these says what is wrong.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "mutations.md"
TIMEOUT = 600  # seconds; the slowest guard takes about a minute


@dataclasses.dataclass(frozen=True)
class Guard:
    """The tests that must catch a bug.

    Args:
        tests: arguments of pytest.
        interpreted: they run the Triton kernels in the interpreter.
        rebuilds: they read the built extension, which takes nvcc to build again.
        gpu: they need a GPU: what is wrong cannot be seen without one.
    """

    tests: str
    interpreted: bool = False
    rebuilds: bool = False
    gpu: bool = False

    def lacks(self) -> str | None:
        """What is missing here to run these tests."""
        if self.gpu and not torch.cuda.is_available():
            return "a GPU"
        return "nvcc" if self.rebuilds and not extensions(ROOT) else None


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A seeded bug: `old`, which occurs once in `file`, becomes `new`."""

    name: str
    bug: str
    file: str
    old: str
    new: str
    guard: Guard


def plain(tests: str) -> Guard:
    return Guard(f"tests/{tests}")


def interpreted(tests: str) -> Guard:
    return Guard(f"tests/{tests}", interpreted=True)


def built(tests: str) -> Guard:
    return Guard(f"tests/{tests}", rebuilds=True)


def gpu(tests: str) -> Guard:
    return Guard(f"tests/{tests}", rebuilds=True, gpu=True)


MUTATIONS = [
    # csrc/activations.cuh
    Mutation(
        "cuda-mish-unclamped",
        "e^x of a large x overflows: NaN in 16 bits",
        "csrc/activations.cuh",
        "exp2_approx(fmaf(clamp_max(x, 20.0f), kLog2e, 32.0f))",
        "exp2_approx(fmaf(x, kLog2e, 32.0f))",
        plain("test_accuracy.py -k 'test_functors and not hardware and mish'"),
    ),
    Mutation(
        "cuda-mish-wrong-scale",
        "one term of the derivative is half as large",
        "csrc/activations.cuh",
        "fmaf(e, -0x1p32f, n)) * r, 0x1p66f, n)",
        "fmaf(e, -0x1p32f, n)) * r, 0x1p65f, n)",
        plain("test_accuracy.py -k 'test_functors and not hardware and mish'"),
    ),
    Mutation(
        "cuda-mish-dropped-term",
        "e^2 + e loses its e in the fp32 derivative",
        "csrc/activations.cuh",
        "fmaf(4.0f * clamped * r, fmaf(e, e, e), n)",
        "fmaf(4.0f * clamped * r, e * e, n)",
        plain("test_accuracy.py -k 'test_functors and not hardware and mish'"),
    ),
    Mutation(
        "cuda-tail-moved",
        "between -87 and -95 the subnormal e^x flushes to 0",
        "csrc/activations.cuh",
        "kTail = -87.0f",
        "kTail = -95.0f",
        plain("test_accuracy.py -k 'test_functors and not hardware and mish'"),
    ),
    Mutation(
        "cuda-swish-uncompensated",
        "what rounding takes from beta x is lost",
        "csrc/activations.cuh",
        "clamped == z ? fmaf(x, beta, -z) : 0.0f",
        "0.0f",
        plain("test_accuracy.py -k 'test_functors and not hardware and swish'"),
    ),
    Mutation(
        "cuda-swish-unscaled",
        "e^-x without the scale overflows where the 16-bit result is still normal",
        "csrc/activations.cuh",
        "      const float e = exp2_approx(fmaf(x, beta * -kLog2e, -32.0f));\n"
        "      return x * (reciprocal_approx(e + 0x1p-32f) * 0x1p-32f);\n",
        "      const float e = exp2_approx(x * (beta * -kLog2e));\n"
        "      return x * reciprocal_approx(e + 1.0f);\n",
        plain("test_accuracy.py -k 'test_functors and not hardware and swish'"),
    ),
    Mutation(
        "cuda-relu6-nan-swallowed",
        "fminf and fmaxf turn NaN into a number",
        "csrc/activations.cuh",
        "return clamp(x, 0.0f, 6.0f);",
        "return fminf(fmaxf(x, 0.0f), 6.0f);",
        plain("test_accuracy.py -k 'specials_in_every_lane and relu6'"),
    ),
    Mutation(
        "cuda-relu6-kink",
        "the gradient passes at exactly 0",
        "csrc/activations.cuh",
        "!(x <= 0.0f || x >= 6.0f)",
        "!(x < 0.0f || x >= 6.0f)",
        plain("test_accuracy.py -k 'test_functors and not hardware and relu6'"),
    ),
    # csrc/math.cuh
    Mutation(
        "cuda-log2e-low",
        "what fp32 does not hold of log2(e) is lost",
        "csrc/math.cuh",
        "fmaf(x, kLog2eLow, -excess)",
        "-excess",
        plain("test_accuracy.py -k 'test_functors and not hardware and mish'"),
    ),
    Mutation(
        "cuda-mask-by-select",
        "the mask takes half an instruction an element more",
        "csrc/math.cuh",
        '  asm("{.reg .pred p;',
        '  return condition ? bits | bit : bits;\n  asm("{.reg .pred p;',
        built("test_machine_code.py -k 'instructions_for and cuda and relu6'"),
    ),
    Mutation(
        "cuda-clamp-nan-swallowed",
        "the device's clamp turns NaN into a number",
        "csrc/math.cuh",
        "min.NaN.f32",
        "min.f32",
        built("test_machine_code.py -k 'let_nan_through and cuda'"),
    ),
    # csrc/access.cuh, csrc/elementwise.cuh
    Mutation(
        "cuda-rounds-toward-zero",
        "the device cuts results off instead of rounding them",
        "csrc/access.cuh",
        "*reinterpret_cast<__half2*>(target) = __floats2half2_rn(a, b);",
        "*reinterpret_cast<__half2*>(target) = "
        "__halves2half2(__float2half_rz(a), __float2half_rz(b));",
        built("test_machine_code.py -k 'round_to_nearest and cuda'"),
    ),
    Mutation(
        "cuda-mask-bits-reversed",
        "a full tile's mask has its first element in the last bit",
        "csrc/elementwise.cuh",
        "[access][i]), bits, 1u << i)",
        "[access][i]), bits, 1u << (S::kElements - 1 - i))",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-tail-bits",
        "the last tile's mask is off by one bit",
        "csrc/elementwise.cuh",
        "activation.passes(value) ? 1u << i : 0u",
        "activation.passes(value) ? 2u << i : 0u",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-tail-overruns",
        "the last tile is written to a multiple of 8 elements",
        "csrc/elementwise.cuh",
        "i < 8 && offset + i < left",
        "i < 8",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-full-tile-overruns",
        "a tile that lacks a few elements runs as a full one",
        "csrc/elementwise.cuh",
        "  if (left >= kTile<T>) {\n    forward_tile",
        "  if (left >= kTile<T> - 8) {\n    forward_tile",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-backward-tail-short",
        "the last gradient is not written",
        "csrc/elementwise.cuh",
        "for (int i = thread; i < left; i += kStride)",
        "for (int i = thread; i < left - 1; i += kStride)",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-32-bit-offset",
        "the start of a tile wraps after 2^31 elements",
        "csrc/elementwise.cuh",
        "return block * kTile<T>;",
        "return static_cast<int>(block) * kTile<T>;",
        plain("test_host_kernels.py -k 32_bits"),
    ),
    Mutation(
        "cuda-run-stride",
        "narrow accesses: those of a thread overlap those of its neighbours",
        "csrc/elementwise.cuh",
        "return (access * kThreads + thread) * kElements;",
        "return (access + thread) * kElements;",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-alignment-of-one",
        "wide accesses wherever one of the addresses allows them",
        "csrc/access.cuh",
        "(reinterpret_cast<uintptr_t>(pointers) | ...)",
        "(reinterpret_cast<uintptr_t>(pointers) & ...)",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-alignment-of-half",
        "accesses of 32 bytes at addresses that allow 16",
        "csrc/access.cuh",
        "addresses % kBytes != 0",
        "addresses % (kBytes / 2) != 0",
        plain("test_host_kernels.py -k as_wide_as"),
    ),
    Mutation(
        "cuda-accesses-of-16-bytes",
        "no access of 32 bytes where the GPU has them",
        "csrc/access.cuh",
        "kWidestAccess = 32;",
        "kWidestAccess = 16;",
        built("test_machine_code.py -k 'as_wide_as and cuda'"),
    ),
    Mutation(
        "cuda-mask-bits-out-of-place",
        "narrow accesses: the bits of all threads of a mask byte lie in its first ones",
        "csrc/access.cuh",
        "bits : *mask | bits << offset % 8)",
        "bits : *mask | bits)",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-neighbours-joined-wrongly",
        "narrow accesses on a GPU: the bits of a neighbour are shifted by its distance alone",
        "csrc/access.cuh",
        "distance) << distance * kElements;",
        "distance) << distance;",
        gpu("test_accuracy_kernels.py -k 'every_fp32_input and relu6'"),
    ),
    Mutation(
        "cuda-mask-read-from-its-first-bit",
        "narrow accesses: every thread of a mask byte takes its first bits",
        "csrc/access.cuh",
        "return bits >> offset % 8;",
        "return bits;",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-two-accesses-a-thread",
        "a tile of 8 KiB, of which each thread has two accesses",
        "csrc/elementwise.cuh",
        "constexpr int kTileBytes = 4096;",
        "constexpr int kTileBytes = 8192;",
        built("test_machine_code.py -k 'accesses_are_as_wide and cuda'"),
    ),
    Mutation(
        "cuda-second-mask-byte",
        "of the two mask bytes of an access of 32 bytes only one is written",
        "csrc/access.cuh",
        "mask[i / 8] =",
        "mask[0] =",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-second-mask-byte-unread",
        "of two mask bytes the second is read into the place of the first",
        "csrc/access.cuh",
        "mask[(offset + i) / 8]) << i;",
        "mask[(offset + i) / 8]);",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-masked-product",
        "an infinite gradient that does not pass becomes NaN",
        "csrc/activations.cuh",
        "  // Not a product: a gradient of inf or NaN that does not pass leaves 0.\n"
        "  __host__ __device__ float gradient(float grad_output, bool passes) const {\n"
        "    return passes ? grad_output : 0.0f;",
        "  __host__ __device__ float gradient(float grad_output, bool passes) const {\n"
        "    return grad_output * static_cast<float>(passes);",
        plain("test_host_kernels.py -k does_not_pass"),
    ),
    Mutation(
        "cuda-sigmoid-tail",
        "sigmoid flushes bf16 below e^-87 to 0",
        "csrc/activations.cuh",
        "      const float e = exp2_approx(fmaf(x, -kLog2e, -32.0f));\n"
        "      return reciprocal_approx(e + 0x1p-32f) * 0x1p-32f;\n",
        "      return reciprocal_approx(exp2_approx(x * -kLog2e) + 1.0f);\n",
        plain("test_accuracy.py -k 'functors and sigmoid'"),
    ),
    Mutation(
        "cuda-tanh-near",
        "tanh near 0 comes from 1 - 2 / (e^2x + 1), which cancels",
        "csrc/activations.cuh",
        "near = 0.55f;",
        "near = 0.15f;",
        plain("test_accuracy.py -k 'functors and tanh'"),
    ),
    Mutation(
        "cuda-selu-output-cancels",
        "SELU's derivative from a rounded output near -scale alpha is off",
        "csrc/activations.cuh",
        "(y + kScaleAlpha) + kScaleAlphaLow",
        "y + kScaleAlpha",
        plain("test_accuracy.py -k functors_of_the_output"),
    ),
    Mutation(
        "cuda-last-block-missing",
        "the last tile is not launched",
        "csrc/elementwise.cuh",
        "return (numel + kTile<T> - 1) / kTile<T>;",
        "return numel / kTile<T>;",
        plain("test_host_kernels.py -k bulk_tail"),
    ),
    Mutation(
        "cuda-default-stream",
        "forward runs on the default stream",
        "csrc/elementwise.cuh",
        "Shares<T, kWidth>::kThreads, 0, stream>>>(activation, x, y,",
        "Shares<T, kWidth>::kThreads>>>(activation, x, y,",
        gpu("test_gpu.py -k 'current_stream and cuda'"),
    ),
    # csrc/mirrored.cuh
    Mutation(
        "cuda-mirrored-short-division",
        "the row of a run past 2^32 comes of a division of 32 bits",
        "csrc/mirrored.cuh",
        "(index | row_length) >> 32 == 0",
        "row_length >> 32 == 0",
        plain("test_mirrored_code.py -k host_finds_runs"),
    ),
    Mutation(
        "cuda-mirrored-rows-out-of-line",
        "the width of an access is that of the first row, and the next rows are out of line",
        "csrc/access.cuh",
        "with_widest_access<T, 16>(run, static_cast<uintptr_t>(columns * sizeof(T)), pointers...);",
        "with_widest_access<T, 16>(run, pointers...);",
        plain("test_mirrored_code.py -k host_accesses"),
    ),
    # csrc/tensors.h and the ops
    Mutation(
        "cuda-layout-ignored",
        "strided inputs and gradients are read as if they were contiguous",
        "csrc/tensors.h",
        "  if (has_layout(x, like.strides())) {\n    return x;\n  }\n",
        "  if (x.numel() > 0) {\n    return x;\n  }\n",
        gpu("test_layouts.py -m gpu -k 'test_layouts and cuda'"),
    ),
    Mutation(
        "cuda-overlap-ignored",
        "an output that overlaps its input is read after it is written",
        "csrc/elementwise_ops.cuh",
        "overlap_partially(x, out) ? torch::stable::clone(x) : x",
        "x",
        gpu("test_kernels.py -m gpu -k 'raw_out_op and cuda'"),
    ),
    Mutation(
        "cuda-no-device-guard",
        "backward launches on whichever device is current",
        "csrc/elementwise_ops.cuh",
        "    check_match(grad_output, saved);\n"
        "    const DeviceGuard guard(saved.get_device_index());\n",
        "    check_match(grad_output, saved);\n",
        plain("test_extension.py -k guards_its_device"),
    ),
    Mutation(
        "cuda-strong-stream-symbol",
        "the library does not load in a CPU build of torch",
        "csrc/tensors.h",
        'extern "C" __attribute__((weak)) AOTITorchError',
        'extern "C" AOTITorchError',
        built("test_extension.py -k stable_symbols"),
    ),
    Mutation(
        "cuda-unregistered",
        "an op has a schema and no kernel",
        "csrc/elementwise_ops.cuh",
        '  library.impl((name + "_with_mask.out").c_str(), '
        "TORCH_BOX(&O::forward_with_mask_out));\n",
        "",
        built("test_extension.py -k implements_every_op"),
    ),
    # setup.py
    Mutation(
        "setup-as-needed",
        "the linker drops libtorch",
        "setup.py",
        '"-Xlinker", "--no-as-needed", "-ltorch"',
        '"-Xlinker", "--as-needed", "-ltorch"',
        built("test_extension.py -k links_torch"),
    ),
    Mutation(
        "setup-demand-ignored",
        "a demanded extension that cannot be built is left out in silence",
        "setup.py",
        '    if choice == "1":\n        raise',
        '    if choice == "yes":\n        raise',
        plain("test_packaging.py -k without_nvcc"),
    ),
    # fused_act/backends/triton/activations.py
    Mutation(
        "triton-mish-dropped-term",
        "e^2 + e loses its e in the 16-bit derivative",
        "fused_act/backends/triton/activations.py",
        "tl.fma(e, -TWO_32, n)",
        "tl.fma(e, -TWO_33, n)",
        interpreted("test_accuracy_kernels.py -k 'every_16_bit and mish'"),
    ),
    Mutation(
        "triton-tail-moved",
        "between -87 and -95 the subnormal e^x has few bits",
        "fused_act/backends/triton/activations.py",
        "TAIL = tl.constexpr(-87.0)",
        "TAIL = tl.constexpr(-95.0)",
        interpreted("test_accuracy_kernels.py -k 'fp32_in_every_binade and (mish or swish)'"),
    ),
    Mutation(
        "triton-clamp-nan-swallowed",
        "the clamp turns NaN into a number",
        "fused_act/backends/triton/math.py",
        "tl.minimum(x, maximum, propagate_nan=tl.PropagateNan.ALL)",
        "tl.minimum(x, maximum)",
        plain("test_machine_code.py -k 'let_nan_through and triton'"),
    ),
    Mutation(
        "triton-relu6-kink",
        "the gradient passes at exactly 6",
        "fused_act/backends/triton/activations.py",
        "(x >= 6.0)",
        "(x > 6.0)",
        interpreted("test_accuracy_kernels.py -k 'every_16_bit and relu6'"),
    ),
    # fused_act/backends/triton/elementwise.py, tiles.py
    Mutation(
        "triton-tail-overruns",
        "one element too many is written",
        "fused_act/backends/triton/elementwise.py",
        "    second_valid = None if FULL else second < numel\n    x_first",
        "    second_valid = None if FULL else second <= numel\n    x_first",
        interpreted("test_layouts.py -k 'nothing_outside and (mish or relu6) and float32'"),
    ),
    Mutation(
        "triton-backward-overruns",
        "one gradient too many is written",
        "fused_act/backends/triton/elementwise.py",
        "    second_valid = None if FULL else second < numel\n    grad_first",
        "    second_valid = None if FULL else second <= numel\n    grad_first",
        interpreted("test_layouts.py -k 'nothing_outside and (mish or relu6) and float32'"),
    ),
    Mutation(
        "triton-mask-bits-reversed",
        "a mask has its first element in the last bit",
        "fused_act/backends/triton/tiles.py",
        "<< (tl.arange(0, SIZE) % 8)",
        "<< (7 - tl.arange(0, SIZE) % 8)",
        interpreted("test_kernels.py -k memory_order"),
    ),
    Mutation(
        "triton-mask-byte-short",
        "the last byte of a mask, if it is not full, is not written",
        "fused_act/backends/triton/elementwise.py",
        "tl.store(mask_ptr + start // 8 + bytes_, mask, mask=bytes_ * 8 < numel)",
        "tl.store(mask_ptr + start // 8 + bytes_, mask, mask=bytes_ * 8 + 8 <= numel)",
        interpreted("test_layouts.py -k 'sizes_and_offsets and relu6'"),
    ),
    Mutation(
        "triton-mask-byte-long",
        "a byte behind the mask is written",
        "fused_act/backends/triton/elementwise.py",
        "tl.store(mask_ptr + start // 8 + bytes_, mask, mask=bytes_ * 8 < numel)",
        "tl.store(mask_ptr + start // 8 + bytes_, mask, mask=bytes_ * 8 <= numel)",
        interpreted("test_layouts.py -k 'nothing_outside and (mish or relu6) and float32'"),
    ),
    Mutation(
        "triton-32-bit-offset",
        "the start of a tile wraps after 2^31 elements",
        "fused_act/backends/triton/elementwise.py",
        "    # 64 bits, for tensors of more than 2^31 elements; within a tile 32 bits do.\n"
        "    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE\n",
        "    start = tl.program_id(0) * BLOCK_SIZE\n",
        plain("test_machine_code.py -k 64_bits"),
    ),
    Mutation(
        "triton-masked-product",
        "an infinite gradient that does not pass becomes NaN",
        "fused_act/backends/triton/activations.py",
        "    # Not a product: a gradient of inf or NaN that does not pass leaves 0.\n"
        "    return tl.where(passes, grad_output, 0.0)",
        "    return grad_output * passes",
        interpreted("test_kernels.py -k does_not_pass"),
    ),
    Mutation(
        "triton-leaky-slope",
        "LeakyReLU's gradient does not pass where it is to be scaled",
        "fused_act/backends/triton/activations.py",
        "    return grad_output * tl.where(passes, 1.0, negative_slope)",
        "    return grad_output * tl.where(passes, 1.0, 0.0)",
        interpreted("test_kernels.py -k 'test_inplace and leaky'"),
    ),
    Mutation(
        "triton-no-register-ceiling",
        "ptxas takes so many registers that an SM holds fewer warps",
        "fused_act/backends/triton/elementwise.py",
        ', "maxnreg": 40}',
        "}",
        plain("test_machine_code.py -k 'registers_suffice and triton'"),
    ),
    Mutation(
        "triton-mask-halves-swapped",
        "the bits of a tile's second half come first",
        "fused_act/backends/triton/elementwise.py",
        "tl.join(mask_first, mask_second)",
        "tl.join(mask_second, mask_first)",
        interpreted("test_kernels.py -k memory_order"),
    ),
    Mutation(
        "triton-tail-in-64-bits",
        "the last tile takes so many registers that the full ones spill",
        "fused_act/backends/triton/elementwise.py",
        "mask_ptr, start, left.to(tl.int32), parameters",
        "mask_ptr, start, left, parameters",
        plain("test_machine_code.py -k 'registers_suffice and triton'"),
    ),
    Mutation(
        "triton-no-device-guard",
        "the kernel launches on whichever device is current",
        "fused_act/backends/triton/elementwise.py",
        "        with torch.cuda.device_of(x):\n",
        "        if True:\n",
        plain("test_api.py -k device_of"),
    ),
    Mutation(
        "triton-input-layout-ignored",
        "a strided input is read as if it were contiguous",
        "fused_act/backends/triton/elementwise.py",
        "        x = with_layout_of(y, x)\n",
        "",
        interpreted("test_layouts.py -k 'test_layouts and float32 and (mish or relu6)'"),
    ),
    Mutation(
        "triton-gradient-layout-ignored",
        "expanded and strided gradients are read as if they were contiguous",
        "fused_act/backends/triton/elementwise.py",
        "grad = with_layout_of(grad_input, grad_output)",
        "grad = grad_output",
        interpreted("test_layouts.py -k 'test_layouts and float32 and (mish or relu6)'"),
    ),
    Mutation(
        "triton-needless-copy",
        "1 x 1 images of channels_last are copied",
        "fused_act/backends/triton/tiles.py",
        "size == 1 or step == expected",
        "step == expected",
        interpreted("test_layouts.py -k one_by_one"),
    ),
    Mutation(
        "triton-overlap-ignored",
        "an output that overlaps its input is read after it is written",
        "fused_act/backends/triton/elementwise.py",
        "            x = x.clone()",
        "            pass",
        interpreted("test_kernels.py -k raw_out_op"),
    ),
    Mutation(
        "triton-mask-in-logical-order",
        "backward takes the bits of a mask in the order of grad_output",
        "fused_act/families/elementwise.py",
        "    return empty_strided(grad_output, grad_output.shape, parameters_and_stride[-1])\n",
        "    return torch.empty_like(grad_output)\n",
        interpreted("test_layouts.py -k 'test_layouts and float32 and (mish or relu6)'"),
    ),
    Mutation(
        "triton-shapes-unchecked",
        "in inference mode, below Autograd, backward reads behind a smaller input",
        "fused_act/backends/triton/__init__.py",
        "    check(name, None, *args, **kwargs)\n",
        "",
        interpreted("test_kernels.py -k raw_backward_checks"),
    ),
    # fused_act/backends/triton/mirrored.py
    Mutation(
        "triton-mirrored-rows-unbounded",
        "the last tile goes on behind the last row",
        "fused_act/backends/triton/mirrored.py",
        "(rows < rows_left)[:, None]",
        "(rows >= 0)[:, None]",
        interpreted("test_mirrored.py -k guard_bands"),
    ),
    Mutation(
        "triton-mirrored-gradients-added",
        "the gradient of the half of -x keeps its sign",
        "fused_act/backends/triton/mirrored.py",
        "GRADIENT(grad, passes) - GRADIENT",
        "GRADIENT(grad, passes) + GRADIENT",
        interpreted("test_mirrored.py -k every_16_bit"),
    ),
    # fused_act/families/mirrored.py
    Mutation(
        "mirrored-order-of-dimensions",
        "the dimensions outside `dim` keep their strides",
        "fused_act/families/mirrored.py",
        "[2 * step if without else step for",
        "[step if without else step for",
        plain("test_mirrored_code.py -k dense_in_the_order"),
    ),
    Mutation(
        "mirrored-without-anchor",
        "a second derivative does not find its way to x",
        "fused_act/families/mirrored.py",
        " + anchor[0].sum()",
        "",
        interpreted("test_mirrored.py -k second_derivative"),
    ),
    Mutation(
        "mirrored-dim-unchecked",
        "a kernel is asked for a dimension that does not exist",
        "fused_act/families/mirrored.py",
        "type(dim) is int and -x.dim() <= dim < x.dim()",
        "type(dim) is int",
        interpreted("test_mirrored.py -k bad_input"),
    ),
    # fused_act/families/base.py, elementwise.py, masks.py
    Mutation(
        "forced-backend-changed",
        "a forced backend leaves a dtype that it does not take to torch",
        "fused_act/families/base.py",
        "    if is_transformed() or isinstance(x, torch.fx.Proxy):\n",
        "    if is_transformed() or getattr(x, 'dtype', None) not in DTYPES:\n",
        interpreted("test_kernels.py -k forced_backend_refuses"),
    ),
    Mutation(
        "negative-bit-forgotten",
        "auto gives a kernel a view whose sign is not in its memory",
        "fused_act/families/base.py",
        " or x.is_neg()",
        "",
        plain("test_api.py -k kernel_or_torch"),
    ),
    Mutation(
        "nested-forgotten",
        "a nested tensor, which looks plain, meets a kernel",
        "fused_act/families/base.py",
        "x.layout is not torch.strided or x.is_nested or x.is_neg()",
        "x.layout is not torch.strided or x.is_neg()",
        plain("test_api.py -k kernel_or_torch"),
    ),
    Mutation(
        "transforms-forgotten",
        "vmap and jvp meet a kernel",
        "fused_act/_torch_private.py",
        "return are_transforms_active() or forward_ad",
        "return forward_ad",
        interpreted("test_autograd.py -k 'transforms and triton'"),
    ),
    Mutation(
        "forward-mode-forgotten",
        "a dual tensor meets a kernel, which loses its tangent",
        "fused_act/_torch_private.py",
        "are_transforms_active() or forward_ad._current_level >= 0 or",
        "are_transforms_active() or",
        plain("test_api.py -k kernel_or_torch"),
    ),
    Mutation(
        "subclass-compiled",
        "a forced backend takes a subclass while torch.compile traces",
        "fused_act/dispatch.py",
        "        if type(x) not in PLAIN:\n",
        "        if type(x) not in PLAIN and not torch.compiler.is_compiling():\n",
        interpreted("test_kernels.py -k refuses_subclasses"),
    ),
    Mutation(
        "function-transformed",
        "MishFunction.apply under vmap gets torch's error about autograd.Function",
        "fused_act/families/base.py",
        "        if is_transformed() and is_ours(cls):\n"
        "            return cls.row.torch_forward(*args)\n",
        "",
        plain("test_autograd.py -k 'transforms and Function'"),
    ),
    Mutation(
        "written-op-kept",
        "selective checkpointing skips an op that writes in place",
        "fused_act/ops.py",
        "                always_recomputed_ops.add(op)\n",
        "",
        interpreted("test_autograd.py -k selective"),
    ),
    Mutation(
        "tracing-forgotten",
        "torch.jit.trace records a kernel",
        "fused_act/_torch_private.py",
        " or tracing_state() is not None",
        "",
        interpreted("test_kernels.py -k jit_traces"),
    ),
    Mutation(
        "inplace-lost",
        "torch's op gets no inplace",
        "fused_act/families/elementwise.py",
        "return self.torch_forward(x, *parameters, inplace=inplace)",
        "return self.torch_forward(x, *parameters, inplace=False)",
        plain("test_fallback.py -k inplace"),
    ),
    Mutation(
        "leaf-overwritten",
        "a leaf that requires grad is written before it is refused",
        "fused_act/families/elementwise.py",
        "    if forbidden or (needs_grad and (x.is_leaf or is_view(x))):\n",
        "    if forbidden:\n",
        interpreted("test_kernels.py -k inplace_refuses"),
    ),
    Mutation(
        "view-overwritten",
        "a view that torch refuses to write is written",
        "fused_act/families/elementwise.py",
        "    if forbidden or (needs_grad and (x.is_leaf or is_view(x))):\n",
        "    if forbidden or (needs_grad and x.is_leaf):\n",
        interpreted("test_kernels.py -k inplace_refuses"),
    ),
    Mutation(
        "inplace-saves-result",
        "backward gets the overwritten input",
        "fused_act/families/elementwise.py",
        'source = x.clone() if self.saves_inplace == "x" else x',
        "source = x",
        interpreted("test_kernels.py -k 'test_inplace and mish'"),
    ),
    Mutation(
        "selu-inplace-from-input",
        "SELU in place takes the output that it saved for the input",
        "fused_act/families/elementwise.py",
        "        return call(kernels.backward_from_output, grad_output, saved, *parameters)",
        "        backward = kernels.backward or kernels.backward_from_output\n"
        "        return call(backward, grad_output, saved, *parameters)",
        interpreted("test_kernels.py -k 'test_inplace and selu'"),
    ),
    Mutation(
        "compiled-inplace-saves-result",
        "backward gets the overwritten input, in a compiled graph",
        "fused_act/families/elementwise.py",
        "self.activate(x.clone(), *parameters)",
        "self.activate(x, *parameters)",
        plain("test_compile.py -k 'one_graph and mish and float32'"),
    ),
    Mutation(
        "backward-of-another-backend",
        "backward takes the backend that is selected then",
        "fused_act/families/elementwise.py",
        "    kernels, parameters = ctx.kernels, ctx.parameters\n    if grad",
        "    kernels, parameters = kernels_for(activation, saved), ctx.parameters\n    if grad",
        interpreted("test_kernels.py -k backward_stays"),
    ),
    Mutation(
        "second-derivative-cut",
        "the gradient is not differentiable",
        "fused_act/families/base.py",
        "return torch.is_grad_enabled() or is_forward_ad_active()",
        "return is_forward_ad_active()",
        interpreted("test_kernels.py -k second_derivative"),
    ),
    Mutation(
        "forward-mode-through-backward-cut",
        "the gradient's tangent is lost",
        "fused_act/families/base.py",
        "return torch.is_grad_enabled() or is_forward_ad_active()",
        "return torch.is_grad_enabled()",
        interpreted("test_kernels.py -k forward_mode"),
    ),
    Mutation(
        "relu6-second-derivative-missing",
        "the second derivative of relu6 is not 0 but missing",
        "fused_act/families/elementwise.py",
        "row.torch_backward(grad_output, x, *parameters) + anchor[0].sum()",
        "row.torch_backward(grad_output, x, *parameters)",
        interpreted("test_kernels.py -k second_derivative"),
    ),
    Mutation(
        "hooks-run-twice",
        "backward under create_graph runs the hooks of x once more",
        "fused_act/families/elementwise.py",
        "x = saved.view_as(saved)",
        "x = saved",
        interpreted("test_kernels.py -k hooks"),
    ),
    Mutation(
        "stride-of-gapped-output",
        "in place with gaps: backward takes the stride of y for that of the mask",
        "fused_act/families/raw_op.py",
        "return (x if x.is_contiguous() else ",
        "return (x if True else ",
        interpreted("test_kernels.py -k 'test_inplace and relu6'"),
    ),
    Mutation(
        "unpacked-in-logical-order",
        "a differentiable gradient takes the bits of a mask in logical order",
        "fused_act/families/elementwise.py",
        "passes = unpack(saved).as_strided(ctx.shape, ctx.stride)",
        "passes = unpack(saved)[: ctx.shape.numel()].view(ctx.shape)",
        interpreted("test_kernels.py -k second_derivative"),
    ),
    Mutation(
        "export-shows-the-formula",
        "ONNX gets the formula, not one node",
        "fused_act/families/base.py",
        "        if is_exporting():\n            return row.eager\n",
        "",
        plain("test_export.py -k program_is_torchs"),
    ),
    Mutation(
        "forced-torch-fuses",
        "use_backend('torch') compiles to the formula, not to torch's op",
        "fused_act/families/base.py",
        "        if forced is not None:\n            forced.check",
        "        if forced is not None and forced.name != 'torch':\n            forced.check",
        plain("test_compile.py -k forcing_torch"),
    ),
    Mutation(
        "subclass-fuses",
        "a subclass gets the formula under torch.compile",
        "fused_act/families/base.py",
        "row.formula if type(x) in PLAIN and x.dtype in DTYPES else",
        "row.formula if x.dtype in DTYPES else",
        plain("test_compile.py -k subclass"),
    ),
    Mutation(
        "dead-wrapper-recorded",
        "a tensor that has outlived its transform gets no gradient",
        "fused_act/families/elementwise.py",
        "        x = unwrap_if_dead(x)\n",
        "        pass\n",
        interpreted("test_kernels.py -k outlived"),
    ),
    # fused_act/ops.py
    Mutation(
        "version-not-bumped",
        "autograd does not learn of a write in place",
        "fused_act/ops.py",
        "    increment_version(out)\n",
        "",
        interpreted("test_kernels.py -k raw_out_op"),
    ),
    Mutation(
        "output-contiguous",
        "an output forgets the strides of x",
        "fused_act/families/raw_op.py",
        "    return torch.empty_like(x)\n",
        "    return x.new_empty(x.shape)\n",
        interpreted("test_layouts.py -k 'test_layouts and float32 and mish'"),
    ),
    Mutation(
        "out-not-mutated",
        "the schema hides that out is written",
        "fused_act/families/elementwise.py",
        'f"{name}.out({x}, *, Tensor(a!) out) -> ()"',
        'f"{name}.out({x}, *, Tensor out) -> ()"',
        interpreted("test_kernels.py -k 'opcheck and mish'"),
    ),
    Mutation(
        "mask-too-long",
        "a byte too many where the size is a multiple of 8",
        "fused_act/families/elementwise.py",
        "return (x.numel() + 7) // 8",
        "return x.numel() // 8 + 1",
        interpreted("test_kernels.py -k raw_backward_checks"),
    ),
    Mutation(
        "empty-expanded-refused",
        "an empty tensor that is expanded passes for one with gaps",
        "fused_act/families/raw_op.py",
        "    if 0 in shape:\n        return True\n",
        "",
        interpreted("test_layouts.py -k empty_expanded"),
    ),
    Mutation(
        "gaps-taken-for-dense",
        "the stride of a tensor with gaps passes for a dense one's",
        "fused_act/families/raw_op.py",
        "        if step != expected:\n",
        "        if step < expected:\n",
        interpreted("test_kernels.py -k raw_backward_checks"),
    ),
    Mutation(
        "shape-unchecked",
        "x of as many elements but another shape passes",
        "fused_act/families/raw_op.py",
        "if other.shape != x.shape:",
        "if other.numel() != x.numel():",
        interpreted("test_kernels.py -k raw_backward_checks"),
    ),
    Mutation(
        "gradient-lost",
        "a raw op takes an input that requires grad",
        "fused_act/ops.py",
        "if any(is_differentiated(tensor) for tensor in tensors):",
        "if False:",
        interpreted("test_kernels.py -k raw_ops_refuse"),
    ),
    Mutation(
        "tangent-lost",
        "a raw op takes an input that has a tangent",
        "fused_act/ops.py",
        "    if is_forward_ad_active() and forward_ad.unpack_dual(x).tangent is not None:\n"
        "        return True\n",
        "",
        interpreted("test_kernels.py -k raw_ops_refuse"),
    ),
    # fused_act/dispatch.py
    Mutation(
        "setting-lost",
        "use_backend ends with auto, not with what was before",
        "fused_act/dispatch.py",
        "        forced = self.previous\n",
        "        forced = None\n",
        plain("test_api.py -k setter"),
    ),
    Mutation(
        "unavailable-backend-changed",
        "a forced backend that is not available becomes torch's",
        "fused_act/dispatch.py",
        '                raise RuntimeError(f"use_backend: {name!r} is not available: {reason}")\n',
        '                backend = get("torch")\n',
        plain("test_api.py -k unavailable_backend"),
    ),
    Mutation(
        "old-gpu-accepted",
        "sm_75, which lacks bfloat16, passes",
        "fused_act/dispatch.py",
        "    if major < 8:\n",
        "    if major < 7:\n",
        plain("test_api.py -k unfit"),
    ),
    Mutation(
        "loaded-by-two-threads",
        "two threads give the raw ops their kernels",
        "fused_act/dispatch.py",
        "        with LOADING:",
        "        if True:",
        plain("test_api.py -k loads_once"),
    ),
    Mutation(
        "broken-extension-silent",
        "auto says nothing of an extension that cannot be loaded",
        "fused_act/dispatch.py",
        "        warnings.warn(text, stacklevel=2)\n",
        "        pass\n",
        plain("test_broken_installs.py -k 'old_torch or other_abi'"),
    ),
    # fused_act/backends/cuda.py
    Mutation(
        "truncated-extension-loaded",
        "a truncated extension is given to the loader, which kills the process",
        "fused_act/backends/cuda.py",
        "    if is_truncated(path):\n",
        "    if False:\n",
        plain("test_broken_installs.py -k truncated"),
    ),
    Mutation(
        "triton-taken-unstarted",
        "without a compiler Triton is taken, and the first launch fails",
        "fused_act/backends/triton/__init__.py",
        "        start()\n",
        "        pass\n",
        plain("test_broken_installs.py -k no_compiler"),
    ),
    Mutation(
        "beta-unbounded",
        "a beta whose product with log2(e) overflows makes NaN of 0",
        "fused_act/activations/swish.py",
        "LARGEST_BETA = 2.3e38",
        "LARGEST_BETA = 3.4e38",
        plain("test_api.py -k test_beta_must_be"),
    ),
    Mutation(
        "torch-checked-after-load",
        "an extension for a newer torch is loaded before it is refused",
        "fused_act/backends/cuda.py",
        "    # Before it is loaded",
        "    load()\n    # Before it is loaded",
        plain("test_broken_installs.py -k old_torch"),
    ),
    # fused_act/activations/
    Mutation(
        "formula-mish-tail",
        "below -87 the formula multiplies by e^(x/2) once",
        "fused_act/activations/mish.py",
        "torch.where(tail, x * e * e, ",
        "torch.where(tail, x * e, ",
        plain("test_accuracy.py -k test_formula"),
    ),
    Mutation(
        "formula-swish-overflow",
        "x * beta / 2 = -inf makes the formula's derivative NaN",
        "fused_act/activations/swish.py",
        "minimum = -120.0 if abs(beta) > 2.0 else None",
        "minimum = None",
        plain("test_accuracy.py -k test_formula"),
    ),
    Mutation(
        "mish-module-inplace-lost",
        "Mish(inplace=True) writes elsewhere",
        "fused_act/activations/mish.py",
        "return mish(input, self.inplace)",
        "return mish(input)",
        plain("test_api.py -k drop_in"),
    ),
    Mutation(
        "swish-backward-dropped-beta",
        "torch's gradient of Swish without its last beta",
        "fused_act/activations/swish.py",
        "return grad_output * gate.conj() + through_gate * beta",
        "return grad_output * gate.conj() + through_gate",
        plain("test_api.py -k applies_on_cpu"),
    ),
    Mutation(
        "swish-true-is-a-beta",
        "swish(x, True), which meant inplace, takes True for beta",
        "fused_act/families/base.py",
        " or isinstance(value, bool)",
        "",
        plain("test_api.py -k beta_must_be"),
    ),
    Mutation(
        "relu6-backward-bound",
        "torch's gradient of ReLU6 passes up to 6.5",
        "fused_act/activations/relu6.py",
        "hardtanh_backward.default(grad_output, x, 0.0, 6.0)",
        "hardtanh_backward.default(grad_output, x, 0.0, 6.5)",
        plain("test_api.py -k applies_on_cpu"),
    ),
    # Compiled code
    Mutation(
        "compiled-transform-unseen",
        "a forced backend's ops get into compiled transforms, for which they have no rule",
        "fused_act/families/base.py",
        "        # Dynamo evaluates this while it traces, and guards on it.\n"
        "        if is_transformed():\n",
        "        if False:\n",
        interpreted("test_compiled_derivatives.py -k 'test_transforms and jvp and triton'"),
    ),
    Mutation(
        "compiled-function-traced",
        "Dynamo traces a Function itself, and cuts second derivatives",
        "fused_act/families/base.py",
        'if not isinstance(members.get("row"), Row):',
        "if True:",
        plain("test_compiled_derivatives.py -k 'test_transforms and Function and grad and mish'"),
    ),
    Mutation(
        "compiled-second-derivative-cut",
        "a gradient that AOTAutograd traces is no longer differentiable",
        "fused_act/families/base.py",
        "return torch.is_grad_enabled() or is_forward_ad_active()",
        "return not torch.compiler.is_compiling() and torch.is_grad_enabled()",
        interpreted("test_compiled_derivatives.py -k 'test_second and traced and relu6'"),
    ),
    Mutation(
        "subclass-of-function-lost",
        "Dynamo computes the activation where a user's subclass of the Function says otherwise",
        "fused_act/families/base.py",
        'if not isinstance(members.get("row"), Row):',
        "if False:",
        plain("test_api.py -k subclass_of_a_function"),
    ),
    Mutation(
        "formula-cached-too-long",
        "code compiled from a formula is loaded after the formula has changed",
        "fused_act/families/base.py",
        "found = zlib.crc32(path.read_bytes(), found)",
        "pass",
        plain("test_compile.py -k graph_changes"),
    ),
    # fused_act/replace.py
    Mutation(
        "owned-forward-replaced",
        "a module that holds a forward of its own is replaced, and runs that one all the same",
        "fused_act/replace.py",
        "            continue\n        if type(module) not in FUSED:\n",
        "        if type(module) not in FUSED:\n",
        plain("test_api.py -k holds_a_forward"),
    ),
    Mutation(
        "owned-forward-restored",
        "a hook keeps the fused forward of a module that is torch's again",
        "fused_act/replace.py",
        '            continue\n        if "replaced_class" in module.__dict__:\n',
        '        if "replaced_class" in module.__dict__:\n',
        plain("test_api.py -k no_hook"),
    ),
    Mutation(
        "parametrized-left-fused",
        "a PReLU that was parametrized after it was replaced keeps its fused base class",
        "fused_act/replace.py",
        "fused = type(module).__base__ if parametrized else type(module)",
        "fused = type(module)",
        plain("test_api.py -k parametrized_since"),
    ),
    Mutation(
        "other-bounds-replaced",
        "a ReLU6 whose bounds somebody has set is replaced",
        "fused_act/replace.py",
        "(module.min_val, module.max_val) != (0.0, 6.0)",
        "module.min_val != 0.0",
        plain("test_api.py -k replace"),
    ),
    Mutation(
        "remat-takes-what-others-packed",
        "what the hooks of a checkpoint made of an input is taken for what ours made",
        "fused_act/rematerialization.py",
        "    if packed.unpack_hook is not unpack or packed.data is None:",
        "    if packed.data is None:",
        plain("test_rematerialization.py -k nothing_of_a_checkpoint"),
    ),
    Mutation(
        "kept-unwatched",
        "rematerialize: a tensor that is kept may have been changed when backward needs it",
        "fused_act/rematerialization.py",
        "if version != self.version:",
        "if False:",
        plain("test_rematerialization.py -k 'changed_before'"),
    ),
    Mutation(
        "changed-output-recomputed",
        "rematerialize: an output that was changed is computed again as it was before",
        "fused_act/rematerialization.py",
        "if is_layout_of(base, tensor) and version_of(base) == 0 and",
        "if is_layout_of(base, tensor) and",
        plain("test_rematerialization.py -k 'random_graphs and auto-0'"),
    ),
    Mutation(
        "negative-bit-lost",
        "rematerialize: a view that negates its memory comes back without its sign",
        "fused_act/rematerialization.py",
        "        and not (view.is_neg() or view.is_conj())\n",
        "",
        plain("test_rematerialization.py -k 'negated_view or every_row'"),
    ),
    Mutation(
        "weight-not-recomputed",
        "rematerialize: PReLU's kernel is called without its weight",
        "fused_act/families/base.py",
        "        return None\n\n\ndef function_class(",
        "        return node.kernels.forward\n\n\ndef function_class(",
        interpreted("test_rematerialization.py -k 'every_row and (prelu or learnable)'"),
    ),
    Mutation(
        "mask-recomputed",
        "rematerialize: what ReLU6's kernel saved, a mask, is taken for its input",
        "fused_act/families/elementwise.py",
        'if self.saves == "y" or kernels.forward_with_mask is not None:',
        'if self.saves == "y":',
        interpreted("test_rematerialization.py -k relu6_kernels"),
    ),
    Mutation(
        "subclass-recomputed",
        "rematerialize: the output of a user's subclass is computed again as that of our Function",
        "fused_act/rematerialization.py",
        "function.recompute(node) if is_ours(function) else None",
        "function.recompute(node)",
        plain("test_rematerialization.py -k subclass_of_a_function"),
    ),
    # The house
    Mutation(
        "import-upwards",
        "the ground imports a backend",
        "fused_act/dispatch.py",
        "\nLOADING = ",
        "\nfrom fused_act.version import __version__\n\nLOADING = ",
        plain("test_architecture.py"),
    ),
    Mutation(
        "private-name-outside",
        "a private name of torch stands outside the one file",
        "fused_act/ops.py",
        "    with below_inplace_or_view():\n",
        "    with torch._C._AutoDispatchBelowADInplaceOrView():\n",
        plain("test_architecture.py -k private_names"),
    ),
    Mutation(
        "family-in-generic-code",
        "a generic file tells families apart",
        "fused_act/ops.py",
        "    for row in ROWS.values():\n",
        '    for row in [row for row in ROWS.values() if row.family != "weighted"]:\n',
        plain("test_architecture.py -k names_no_family"),
    ),
    Mutation(
        "registered-in-another-family",
        "csrc/register.cu lacks an activation that Python has",
        "csrc/register.cu",
        '  weighted::implement<PReLU>(library, "prelu");\n',
        "",
        plain("test_architecture.py -k registers"),
    ),
    Mutation(
        "function-elsewhere",
        "a public Function says that it is in a module that does not have it",
        "fused_act/families/base.py",
        '{"__module__": "fused_act", ',
        '{"__module__": __name__, ',
        plain("test_architecture.py -k public_functions"),
    ),
    Mutation(
        "norm-untried",
        "rematerialize: a norm that gives other bits the second time is computed again",
        "fused_act/rematerialization.py",
        "    return Recomputed(compute, [x]) if SAME_BITS[configuration] else None\n",
        "    return Recomputed(compute, [x])\n",
        plain("test_rematerialization.py -k differs_the_second_time"),
    ),
    # Activations with a weight
    Mutation(
        "weight-gradient-product",
        "a gradient of inf that does not reach the weight makes NaN of its gradient",
        "csrc/activations.cuh",
        "return x > 0.0f ? 0.0f : grad_output * x;",
        "return grad_output * (x > 0.0f ? 0.0f : x);",
        plain("test_weighted.py -k does_not_reach"),
    ),
    Mutation(
        "weight-gradient-early-flush",
        "learnable Swish in fp32: e^(-z / 2) flushes where x^2 e^-z is normal",
        "csrc/activations.cuh",
        "const float half = tail ? 0.25f : 0.5f;",
        "const float half = tail ? 0.5f : 0.5f;",
        plain("test_weighted.py -k 'functors and exact and float32'"),
    ),
    Mutation(
        "cuda-narrow-as-many-elements",
        "threads with narrow accesses have as many weights and sums as elements of wide ones",
        "csrc/weighted.cuh",
        "kRuns = (kWide ? 64 : 32) /",
        "kRuns = 64 /",
        built("test_weighted.py -k narrow_accesses"),
    ),
    Mutation(
        "weight-of-another-row",
        "rows take the weight of the tile's first",
        "csrc/weighted.cuh",
        "const int64_t row = place.row + i * place.row_step;\n      result",
        "const int64_t row = place.row;\n      result",
        plain("test_weighted.py -k host_loops"),
    ),
    Mutation(
        "sum-of-another-row",
        "the sums of a row of a thread go to its first row",
        "csrc/weighted.cuh",
        "const int64_t row = place.row + i * place.row_step;\n  return",
        "const int64_t row = place.row;\n  return",
        plain("test_weighted.py -k host_loops"),
    ),
    Mutation(
        "triton-weight-channel",
        "rows have the weights in turn from the first again in each tile",
        "fused_act/backends/triton/weighted.py",
        "((row % weights).to(tl.int32) + tl.arange(0, BLOCK_M)) % weights",
        "tl.arange(0, BLOCK_M) % weights",
        interpreted("test_weighted.py -k 'layouts_and_sums and per_channel-contiguous'"),
    ),
]


@dataclasses.dataclass(frozen=True)
class Result:
    """The test that failed first, or else why the bug does not count as caught."""

    caught_by: str = ""
    why_not: str = ""
    output: str = ""


def extensions(root: Path) -> list[Path]:
    return list((root / "fused_act").glob("_C*.so"))


def copy_tree(target: Path) -> Path:
    """Copy what git tracks or does not ignore, and the built extension, into `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = {ROOT / name for name in listed.split("\0") if name} | set(extensions(ROOT))
    for source in filter(Path.is_file, paths):
        copy = target / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
    return target


def run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in `tree`, with its package and none of its byte code from before."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=inherited | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def run_guard(tree: Path, guard: Guard, *options: str) -> subprocess.CompletedProcess:
    command = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *options]
    command += shlex.split(guard.tests)
    if guard.interpreted:
        return run(tree, *command, "-m", "not gpu", TRITON_INTERPRET="1")
    return run(tree, *command)


def check_guard(tree: Path, guard: Guard) -> Result:
    """Whether `guard` passes without a bug, and runs a test where it can."""
    try:
        done = run_guard(tree, guard)
    except subprocess.TimeoutExpired:
        return Result(why_not="hangs")
    if done.returncode != 0:
        return Result(why_not="fails without a bug, or selects no test", output=done.stdout)
    if guard.lacks() is None and " PASSED" not in done.stdout:
        return Result(why_not="skips all its tests", output=done.stdout)
    return Result()


def try_mutation(tree: Path, mutation: Mutation) -> Result:
    """Seed the bug in `tree`, run its guards, take it out again."""
    path = tree / mutation.file
    original = path.read_text()
    assert original.count(mutation.old) == 1, f"{mutation.name}: `old` must occur once"
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        if mutation.guard.rebuilds:
            build = run(tree, "setup.py", "-q", "build_ext", "-f", "--inplace")
            if build.returncode != 0:
                return Result(why_not="does not build", output=build.stdout)
        done = run_guard(tree, mutation.guard, "-x")
    except subprocess.TimeoutExpired:
        return Result(why_not="hangs")
    finally:
        path.write_text(original)
        if mutation.guard.rebuilds:
            for extension in extensions(ROOT):
                shutil.copy2(extension, tree / extension.relative_to(ROOT))
    return judge(done)


def judge(done: subprocess.CompletedProcess) -> Result:
    if failed := re.search(r"^(tests/.*?) FAILED", done.stdout, re.MULTILINE):
        return Result(caught_by=failed[1], output=done.stdout)
    if done.returncode < 0:  # a signal: the test that was running is the last one named
        running = re.findall(r"^(tests/\S+::.*?)(?: PASSED| SKIPPED| Fatal|$)", done.stdout, re.M)
        return Result(caught_by=f"{running[-1].strip()} (crash)", output=done.stdout)
    why_not = "survives" if done.returncode == 0 else f"pytest exits with {done.returncode}"
    return Result(why_not=why_not, output=done.stdout)


def on_every_tree(trees: queue.Queue, work: Callable, items: Iterable, what: str) -> dict:
    """`work(tree, item)` for each item, as many at a time as there are trees."""
    # Not at the top: `make gpu` collects the tests with what the machine has.
    from tqdm import tqdm

    def with_tree(item):
        tree = trees.get()
        try:
            return item, work(tree, item)
        finally:
            trees.put(tree)

    items = list(items)
    with concurrent.futures.ThreadPoolExecutor(trees.qsize()) as pool:
        futures = [pool.submit(with_tree, item) for item in items]
        done = concurrent.futures.as_completed(futures)
        progress = tqdm(done, what, len(items), leave=False, smoothing=0)
        try:
            return dict(future.result() for future in progress)
        except BaseException:  # Ctrl-C must not wait for those that have not begun
            pool.shutdown(cancel_futures=True)
            raise


def written() -> dict[str, list[str]]:
    """The rows of the committed table, by name."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    return {row[0]: row for row in rows}


def table(results: dict[Mutation, Result], rows: dict[str, list[str]]) -> str:
    """The table of `results`; what they leave out is as `rows` have it."""
    from tabulate import tabulate

    for mutation, result in results.items():
        verdict = f"`{result.caught_by}`" if result.caught_by else f"**{result.why_not}**"
        rows[mutation.name] = [mutation.name, f"`{mutation.file}`", mutation.bug, verdict]
    ordered = [rows[mutation.name] for mutation in MUTATIONS if mutation.name in rows]
    return tabulate(ordered, ("name", "file", "bug", "caught first by"), "github")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help="bugs to seed; none means all")
    parser.add_argument("-j", type=int, default=2, help="how many at a time (%(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not arguments.names or m.name in arguments.names]
    with tempfile.TemporaryDirectory() as folder:
        trees = queue.Queue()
        for worker in range(arguments.j):
            trees.put(copy_tree(Path(folder) / str(worker)))
        guards = dict.fromkeys(mutation.guard for mutation in chosen)
        unfit = {
            guard: result
            for guard, result in on_every_tree(trees, check_guard, guards, "guards").items()
            if result.why_not
        }
        for guard, result in unfit.items():
            print(f"{result.output}\n{guard.tests}: {result.why_not}")
        if unfit:
            return 1
        runnable = [mutation for mutation in chosen if mutation.guard.lacks() is None]
        results = on_every_tree(trees, try_mutation, runnable, "bugs")
    for mutation in chosen:
        if mutation not in results:
            results[mutation] = Result(why_not=f"needs {mutation.guard.lacks()}")
    if arguments.names:
        print(*(results[mutation].output for mutation in chosen), sep="\n")
    print(table(results, {}))
    TABLE.write_text(HEADER + table(results, written()) + "\n")
    survivors = [mutation.name for mutation in runnable if not results[mutation].caught_by]
    caught = f"{len(runnable) - len(survivors)} of {len(runnable)} seeded bugs caught"
    lacking = collections.Counter(mutation.guard.lacks() for mutation in chosen)
    caught += "".join(f", {count} more need {what}" for what, count in lacking.items() if what)
    if survivors:
        caught += f"; not caught: {', '.join(survivors)}"
    print(f"make mutate: {caught}")
    return bool(survivors)


HEADER = """# Seeded bugs and the tests that catch them

Written by `make mutate`, which seeds each bug in a copy of the sources and runs the tests that
guard against it. `tests/mutations.py` has the replacements and says what counts as caught.

"""

if __name__ == "__main__":
    sys.exit(main())
