"""How long whole networks take in training and inference, and how much memory, with fused_act.

    python -m benchmarks networks [--quick] [--compiled] [--networks NAME ...] [--modes NAME ...]

All modes of a network begin with the same weights and see the same batch. They take turns step by
step, each round in another order, so that heat, clocks and other users meet all of them alike.

- torch: torch's own modules. fused: the same network after `replace_activations`, with the backend
  that `auto` takes; fused triton: with Triton, where auto takes another on this GPU.
- fused remat, fused remat norm: `rematerialize()` around forward, without and with `norm`.
- checkpoint: torch's modules, with `torch.utils.checkpoint` around every block of the network.
- training is a step: zero_grad, forward, cross-entropy, backward, SGD with momentum. inference is
  forward alone in `torch.inference_mode`; modes that only save memory for backward are left out.
- On a GPU bf16 autocast and, for images, channels_last; on a CPU fp32, on one thread.

ms is the wall time of a step, from an idle GPU to an idle GPU, median and least of all rounds. On a
GPU device_ms is what its kernels take in a step; where that is less than 90 % of ms, the host
bounds the step. step_gb is the most that is allocated in a step beyond what was before; peak_gb is
that and what the mode itself holds: parameters, buffers, the state of the optimizer, the batch. GB
are 2^30 bytes.

Before it is timed, each mode has to compute what torch's own modules do: of a few samples, in fp32
without autocast, the outputs of inference and, in training, the gradients. Where either is more
than 0.05 of its size off torch's, the row has an error, and its times all the same. The loss of the
third step is a column; where it is more than 5 % off torch's, that is an error too. It shows what
fails in bf16 or in compiled networks, of which nothing else is compared, but it hardly shows a
wrong activation: the loss of a network that was never trained depends little on them.

Without a GPU the small networks of benchmarks/small_networks.py run, and the large ones only where
--networks names them, in small batches. With --compiled, torch and fused are compiled by
`torch.compile`, and the file is networks_compiled.csv; on a GPU four networks are compiled where
--networks names none, since all of them take longer than the time limit. What does not fit into
memory or into the time limit gets rows that say so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_act
from benchmarks import environment, models, options, timing, traces
from benchmarks.models import NETWORKS, Network
from benchmarks.providers import DEVICE, error_text
from benchmarks.speed import OUT_OF_MEMORY, is_out_of_memory
from fused_act import dispatch

ON_GPU = DEVICE.type == "cuda"
TRAINING, INFERENCE = "training", "inference"
GIB = 2**30
WARM_UP = 3  # steps of each mode; the loss of the last one is compared
# How far outputs and gradients may be from torch's. Wrong activations are farther off in one of
# them; rounding at the kink of ReLU6 makes 0.01 in a MobileNetV2.
OF_THE_SIZE = 0.05
WIDER = 2  # the factor of a norm's outputs for gradients; without it ReLU6 clips almost nothing
TRACED = 2  # steps of each mode whose kernels are added up
OF_TORCHS = 0.05  # how far, as a share, a loss may be from torch's
LATE = "over the time limit"


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to train a network, or to run it.

    Args:
        is_ours: torch's activations are replaced.
        backend: what `fused_act.use_backend` is to select.
        block: what forward runs in.
        checkpoints: every block of the network runs in a checkpoint.
        infers: it takes part in inference, too.
        compiles: it takes part where the networks are compiled.
    """

    is_ours: bool = False
    backend: str = "auto"
    block: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    checkpoints: bool = False
    infers: bool = False
    compiles: bool = False

    def unavailable(self) -> str | None:
        """Why there is nothing to measure here, or None if there is."""
        if self.backend == "auto":
            return None
        if not ON_GPU:
            return "no GPU is here"
        reason = dispatch.BACKENDS[self.backend].unavailable()
        if reason is None and dispatch.automatic().name == self.backend:
            return "it is the backend that auto takes"
        return reason

    def takes_part(self, direction: str, is_compiled: bool) -> bool:
        return (self.infers or direction == TRAINING) and (self.compiles or not is_compiled)

    def backend_taken(self, is_compiled: bool) -> str:
        """The backend that computes the activations, "" for torch's own modules."""
        if not self.is_ours:
            return ""
        if is_compiled:
            return "inductor"
        if self.backend != "auto":
            return self.backend
        return dispatch.automatic().name if ON_GPU else "torch"


MODES = {
    "torch": Mode(infers=True, compiles=True),
    "fused": Mode(is_ours=True, infers=True, compiles=True),
    "fused triton": Mode(is_ours=True, backend="triton", infers=True),
    "fused remat": Mode(is_ours=True, block=fused_act.rematerialize),
    "fused remat norm": Mode(is_ours=True, block=partial(fused_act.rematerialize, norm=True)),
    "checkpoint": Mode(checkpoints=True),
}


def checkpoint_blocks(module: nn.Module, block: str) -> int:
    """Run each module in `module` of the class that is called `block` in a checkpoint.

    Returns:
        How many there are; what is within one of them does not count.
    """
    count = 0
    for child in module.children():
        if type(child).__name__ == block:
            child.forward = partial(checkpoint, child.forward, use_reentrant=False)
            count += 1
        else:
            count += checkpoint_blocks(child, block)
    return count


class Case(NamedTuple):
    """What all modes that take turns have in common."""

    name: str
    direction: str
    is_compiled: bool

    @property
    def network(self) -> Network:
        return NETWORKS[self.name]


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU)


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float]:
    """How far `ours` are from `theirs`, over all elements of all tensors, and the size of these."""
    off = size = 0.0
    for our, their in zip(ours, theirs, strict=True):
        their = their.double()
        off = off + (our.double() - their).square().sum()
        size = size + their.square().sum()
    return math.sqrt(off), math.sqrt(size)


def what_is_off(ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> str:
    """Says by how much `ours` are off torch's, "" where rounding explains it."""
    off, size = distance(ours, theirs)
    if off <= OF_THE_SIZE * size:  # not so where either is no number
        return ""
    share = off / size if size else math.inf
    return f"{what} are {share:.2g} of their size off torch's"


@contextlib.contextmanager
def wider_norms(module: nn.Module) -> Iterator[None]:
    """Let batch norms give larger values inside; afterwards their weights are the same bits."""
    weights = [each.weight for each in models.batch_norms(module) if each.weight is not None]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(WIDER)  # a power of two
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in weights:
                weight.div_(WIDER)


class Copy:
    """A copy of a network in one mode, ready for steps."""

    def __init__(self, case: Case, mode: Mode, module: nn.Module, batch: tuple[Tensor, Tensor]):
        self.mode, self.batch, self.steps = mode, batch, 0
        self.module = copy.deepcopy(module).train(case.direction == TRAINING)
        found = []
        if mode.is_ours:
            fused_act.replace_activations(self.module, report=found.append)
        self.replaced = sum(each.fused is not None for each in found)
        if mode.checkpoints and not checkpoint_blocks(self.module, case.network.block):
            raise ValueError(f"{case.name} has no block of a class {case.network.block}")
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.01, momentum=0.9)
        self.run = torch.compile(self.module, dynamic=False) if case.is_compiled else self.module

    def outputs(self, inputs: Tensor) -> Tensor:
        with self.mode.block():
            return self.run(inputs)

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def sample(self) -> dict[str, list[Tensor]]:
        """What this mode computes of a few samples, in fp32: outputs and, in training, gradients.

        The outputs are those of inference, since norms that train hide an activation that is too
        large by a factor. The network is left as it was.
        """
        try:
            return self.sample_with(cudnn=True)
        except RuntimeError as error:
            # In fp32 without TF32 a convolution may have no algorithm that is deterministic.
            if "unable to find an engine" not in str(error):
                raise
        return self.sample_with(cudnn=False)

    def sample_with(self, cudnn: bool) -> dict[str, list[Tensor]]:
        """Args: cudnn: convolutions are those of cuDNN, and else torch's own."""
        is_training, found = self.module.training, {}
        statistics = [(each, each.clone()) for each in self.module.buffers()]
        inputs, targets = models.few(self.batch)
        with (
            fused_act.use_backend(self.mode.backend),
            # A value that rounding moves over the kink of ReLU6 changes its gradient entirely: a
            # MobileNetV2 whose activations are 1e-7 off has gradients that are 0.01 off.
            torch.backends.cudnn.flags(enabled=cudnn, deterministic=True, allow_tf32=False),
        ):
            try:
                self.module.eval()
                with torch.no_grad() if is_training else torch.inference_mode():
                    found["outputs"] = [self.outputs(inputs)]
                self.module.train(is_training)
                if is_training:
                    found["gradients"] = self.gradients(inputs, targets)
            finally:
                self.module.train(is_training)
                for each, before in statistics:
                    each.copy_(before)
        return found

    def gradients(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        torch.manual_seed(0)  # dropout is that of all modes
        self.optimizer.zero_grad(set_to_none=True)  # of a backward that stopped halfway
        with wider_norms(self.module):
            self.loss_of(self.outputs(inputs), targets).backward()
        parameters = list(self.module.parameters())
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def train(self) -> Tensor:
        """Returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = self.loss_of(self.outputs(self.batch[0]), self.batch[1])
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.inference_mode()
    def infer(self) -> Tensor:
        """Returns the outputs, since a loss is no part of inference."""
        with autocast():
            return self.outputs(self.batch[0])

    def seed(self) -> None:
        """Let the next step draw what that step draws in all modes, for dropout."""
        torch.manual_seed(self.steps)
        self.steps += 1

    def go(self) -> Tensor:
        """One step, and the GPU is done with it."""
        with fused_act.use_backend(self.mode.backend):
            found = self.train() if self.module.training else self.infer()
        traces.synchronize()
        return found

    def step(self) -> tuple[float, float]:
        """Take one step, and return its seconds and its loss."""
        self.seed()
        traces.synchronize()
        start = time.perf_counter()
        found = self.go()
        seconds = time.perf_counter() - start
        if not self.module.training:
            found = self.loss_of(found.float(), self.batch[1])
        return seconds, found.item()

    def step_bytes(self) -> int:
        """The most that is allocated in a step, which begins without gradients."""
        self.seed()
        self.optimizer.zero_grad(set_to_none=True)
        return traces.most_allocated(self.go)

    def held_bytes(self) -> int:
        """What is there between two steps, without gradients; each storage once."""
        state = (value for each in self.optimizer.state.values() for value in each.values())
        tensors = (*self.module.parameters(), *self.module.buffers(), *self.batch, *state)
        storages = (each.untyped_storage() for each in tensors if isinstance(each, Tensor))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def device_ms(self) -> float | None:
        """What the GPU works in a step, or None where there is no GPU or no profile of it."""
        return traces.device_ms(self.go, TRACED) if ON_GPU else None


class Run:
    """One who takes turns: what was measured of a mode, or why it was not.

    What fails, or does not fit into memory, frees its copy and lets the others go on.
    """

    def __init__(self, name: str, skipped: str = ""):
        self.name, self.mode = name, MODES[name]
        self.copy: Copy | None = None
        self.samples: list[float] = []  # in ms
        self.figures: dict[str, object] = {}
        self.loss: float | None = None
        self.skipped, self.error = skipped, ""
        self.off = ""  # what it computes wrongly; it is timed all the same

    def attempt(self, action: Callable[[], None]) -> None:
        if self.skipped or self.error:
            return
        try:
            action()
            return
        except Exception as error:
            self.copy, self.samples, self.figures, self.loss = None, [], {}, None
            if is_out_of_memory(error):
                self.skipped = OUT_OF_MEMORY
            else:
                self.error = error_text(error)
        free_memory()  # now that no frame of the error holds tensors any more

    def prepare(
        self,
        case: Case,
        module: nn.Module,
        batch: tuple[Tensor, Tensor],
        of_torch: dict[str, list[Tensor]],
    ) -> None:
        """Compares, compiles, lets libraries take their workspaces, and measures memory.

        Args:
            of_torch: what torch's modules compute of a few samples; mode torch puts it in.
        """
        self.copy = Copy(case, self.mode, module, batch)
        if not case.is_compiled:  # another shape would be compiled anew
            try:
                self.compare(self.copy.sample(), of_torch)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.off = f"not compared: {error_text(error)}"
                self.copy = Copy(case, self.mode, module, batch)  # it may have stopped halfway
        for _ in range(WARM_UP):
            _, self.loss = self.copy.step()
        step, held = self.copy.step_bytes(), self.copy.held_bytes()
        self.figures = {"peak_gb": (held + step) / GIB, "step_gb": step / GIB}

    def compare(self, found: dict[str, list[Tensor]], of_torch: dict[str, list[Tensor]]) -> None:
        if self.name == "torch":
            of_torch.update(found)
        elif of_torch:
            texts = (what_is_off(ours, of_torch[what], what) for what, ours in found.items())
            self.off = ", ".join(filter(None, texts))

    def take_turn(self) -> None:
        self.attempt(lambda: self.samples.append(1000 * self.copy.step()[0]))

    def trace(self) -> None:
        """Adds what a profile says; where there is none, what was timed stays."""
        if not self.samples:
            return
        if (found := self.copy.device_ms()) is None:
            free_memory()  # which may be what the profile lacked
        else:
            median = statistics.median(self.samples)
            self.figures |= {"device_ms": found, "bound": bound(found, median)}

    def compare_loss(self, of_torch: float) -> None:
        if differs(self.loss, of_torch) and not self.off:
            self.off = f"the loss is {self.loss:.5g}, torch's {of_torch:.5g}"

    def row(self, case: Case) -> dict:
        """Empty where nothing was measured."""
        network, samples = case.network, self.samples
        median, q20, q80 = quantiles(samples) if samples else ("", "", "")
        return {
            "net": case.name,
            "batch": network.shape()[0],
            "direction": case.direction,
            "mode": self.name,
            "backend": self.mode.backend_taken(case.is_compiled),
            "replaced": self.copy.replaced if self.copy else "",
            "ms": median,
            "min": min(samples, default=""),
            "q20": q20,
            "q80": q80,
            "samples": len(samples),
            **dict.fromkeys(("device_ms", "bound", "peak_gb", "step_gb"), ""),
            **self.figures,
            "per_second": 1000 * network.units() / median if samples else "",
            "unit": network.unit(),
            "loss": "" if self.loss is None else self.loss,
            "dtype": "bf16" if ON_GPU else "fp32",
            "skipped": self.skipped,
            "error": self.error or self.off,
        }


def quantiles(samples: list[float]) -> list[float]:
    """The median, and the quantiles of 20 % and 80 %."""
    which = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return torch.tensor(samples, dtype=torch.float64).quantile(which).tolist()


def bound(device_ms: float, ms: float) -> str:
    """What a step of `ms` waits for: the host, if the GPU is idle for a tenth of it or more."""
    return "host" if device_ms < 0.9 * ms else "device"


def differs(loss: float, of_torch: float) -> bool:
    """Whether a loss is off by more than rounding explains; one that is no number is."""
    return not abs(loss - of_torch) <= OF_TORCHS * abs(of_torch)


def free_memory() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def measure(case: Case, names: Sequence[str], rounds: int, skipped: str = "") -> list[dict]:
    """One row for each mode.

    Args:
        skipped: why nothing is to be measured, if so.
    """
    runs = [Run(name, skipped) for name in names]
    if not skipped:
        measure_in_turn(runs, case, rounds)
    rows = [run.row(case) for run in runs]
    del runs
    free_memory()
    return rows


def measure_in_turn(runs: list[Run], case: Case, rounds: int) -> None:
    if case.is_compiled:
        torch.compiler.reset()  # compiled code shares one cache, which after 8 entries is not used
    made = []
    for run in runs:  # all fail where the network cannot be made
        run.attempt(lambda: made or made.extend(case.network.made_and_batch()))
    sampled: dict[str, list[Tensor]] = {}
    for run in sorted(runs, key=lambda run: run.name != "torch"):  # torch first
        run.attempt(lambda run=run: run.prepare(case, *made, sampled))
    made.clear()
    sampled.clear()
    timing.in_rounds([run.take_turn for run in runs], rounds)
    # Last: what a profiler may leave behind slows the host in all modes of the next case alike. It
    # waits for no further case, since these copies would have to stay in memory meanwhile.
    for run in runs:
        run.trace()
    of_torch = next((run.loss for run in runs if run.name == "torch" and run.copy), None)
    for run in runs:
        if of_torch is not None:
            run.attempt(partial(run.compare_loss, of_torch))


def measure_all(
    names: Sequence[str], modes: Sequence[str], is_compiled: bool, rounds: int, time_limit: float
) -> Iterator[dict]:
    """Training and inference of one network after another.

    So a run that is cut off has both of the networks that come first.
    """
    deadline = time.monotonic() + time_limit
    cases = list(itertools.product(names, (TRAINING, INFERENCE)))
    for name, direction in environment.progress(cases, len(cases)):
        taking_part = [mode for mode in modes if MODES[mode].takes_part(direction, is_compiled)]
        skipped = LATE if time.monotonic() > deadline else ""
        rows = measure(Case(name, direction, is_compiled), taking_part, rounds, skipped)
        clocks = environment.clocks()
        yield from (row | clocks for row in rows)


# The first results: fewer columns, and names that have changed.
OLDER_NAMES = {
    "mobilenet_v2 relu6 bs8": "mobilenet_v2 bs8",
    "fused notinplace+remat": "fused remat",
    "fused notinplace+remat norm": "fused remat norm",
}


def of_today(row: dict[str, str]) -> dict[str, str]:
    """A row of a networks.csv of any age, as it would be written today."""
    return row | {
        "net": OLDER_NAMES.get(row["net"], row["net"]),
        "direction": row.get("direction") or TRAINING,
        "mode": OLDER_NAMES.get(row["mode"], row["mode"]),
        "step_gb": row.get("step_gb") or row.get("step_gib", ""),
    }


def read(path: Path) -> list[dict[str, str]]:
    return [of_today(row) for row in environment.read_csv(path)]


class BesideTorch(NamedTuple):
    """What a mode takes, as a share of what torch's own modules do.

    nan where it was not measured.
    """

    time: float
    memory: float
    least: float


def beside_torch(rows: Sequence[dict]) -> dict[tuple[str, str, str], BesideTorch]:
    """By network, direction and mode: all that were timed, where torch's modules were."""
    found = {
        (row["net"], row["direction"], row["mode"]): [
            float(math.nan if row[column] == "" else row[column])
            for column in ("ms", "step_gb", "min")
        ]
        for row in rows
        if row["ms"] != ""
    }
    return {
        key: BesideTorch(*(ours / theirs for ours, theirs in zip(numbers, found[base])))
        for key, numbers in found.items()
        if (base := (*key[:2], "torch")) in found
    }


def cell(number: object, digits: str) -> str:
    return "" if number == "" or math.isnan(number) else f"{number:{digits}}"


def print_results(rows: list[dict]) -> None:
    """Each mode below the others of its network, losses like gains."""
    ratios, lines, last = beside_torch(rows), [], None
    for row in rows:
        key = row["net"], row["direction"], row["mode"]
        of_torchs = ratios.get(key, BesideTorch(math.nan, math.nan, math.nan))
        if row["ms"] != "":
            network = f"{row['net']}, {row['direction']}, {row['batch']}"
            lines.append(
                (
                    network if key[:2] != last else "",
                    " ".join(filter(None, (row["mode"], row["backend"] and f"({row['backend']})"))),
                    *(cell(row["ms"], ".2f"), cell(of_torchs.time, ".2f")),
                    *(cell(row["min"], ".2f"), cell(of_torchs.least, ".2f")),
                    *(cell(row["device_ms"], ".2f"), row["bound"]),
                    *(cell(row["step_gb"], ".4f"), cell(of_torchs.memory, ".2f")),
                    f"{cell(row['per_second'], ',.0f')} {row['unit']}",
                    str(row["replaced"]),
                )
            )
            last = key[:2]
    print("\nA step, and beside torch's own modules (above 1: slower, or larger)\n")
    header = ("network, batch", "mode", "ms", "of torch's", "least", "of torch's", "device ms")
    header += ("bound", "step, GiB", "of torch's", "a second", "replaced")
    print(environment.table(header, lines))
    for row in rows:
        if reason := row["error"] or row["skipped"]:
            what = "failed" if row["error"] else "skipped"
            print(f"{row['net']}, {row['direction']}, {row['mode']}: {what}: {reason}")


def name_in(choices: dict[str, object], name: str) -> str:
    options.one_of(choices, name)
    return name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rounds of the small networks, on a GPU of 'mobilenet_v2 bs8' too",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="compiled by torch.compile; takes minutes"
    )
    parser.add_argument(
        "--networks",
        type=partial(name_in, NETWORKS),
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(map(repr, NETWORKS))}; default: all, with --compiled "
        f"{', '.join(map(repr, models.LARGE))}; on a CPU the small ones",
    )
    parser.add_argument(
        "--modes",
        type=partial(name_in, MODES),
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(map(repr, MODES))}; default: all",
    )
    parser.add_argument(
        "--rounds",
        type=options.count,
        metavar="N",
        help="steps of each mode that are timed; default: 12, on a CPU 9, with --quick 5",
    )
    options.add_time_limit(parser, "90 on a GPU, with --compiled 240; none on a CPU")


def available(what: str, asked: Sequence[str], choices: dict[str, Network | Mode]) -> list[str]:
    """Those of the names `asked` that can run here; says why the others cannot."""
    reasons = {name: choices[name].unavailable() for name in asked}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"without {name}: {reason}")
    found = [name for name in asked if reasons[name] is None]
    if not found:
        environment.refuse(f"none of the {what} can run here: {', '.join(asked)}")
    return found


def chosen_networks(arguments: argparse.Namespace) -> list[str]:
    """Those that were asked for and can be built; says why the others cannot."""
    large = models.COMPILED if arguments.compiled else models.DEFAULT
    asked = list(dict.fromkeys(arguments.networks or (models.QUICK if arguments.quick else large)))
    return available("networks", asked, NETWORKS)


def chosen_modes(arguments: argparse.Namespace) -> list[str]:
    """Those that were asked for and can run here; says why others that were named cannot."""
    takes_part = [
        name for name, mode in MODES.items() if mode.takes_part(TRAINING, arguments.compiled)
    ]
    asked = list(dict.fromkeys(arguments.modes or takes_part))
    if not set(asked) <= set(takes_part):
        got = ", ".join(name for name in asked if name not in takes_part)
        environment.refuse(f"--compiled takes the modes {', '.join(takes_part)}, got {got}")
    return available("modes", asked, MODES)


def time_limit(arguments: argparse.Namespace) -> float:
    if arguments.time_limit is not None:
        return arguments.time_limit
    return (240.0 if arguments.compiled else 90.0) if ON_GPU else math.inf


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    names, modes = chosen_networks(arguments), chosen_modes(arguments)
    if not ON_GPU:
        print("NO GPU: no kernel ran; fused computes what torch does, on one CPU thread.")
        torch.set_num_threads(1)  # several wait for each other on a busy machine
    rounds = arguments.rounds or (5 if arguments.quick else 12 if ON_GPU else 9)
    found = measure_all(names, modes, arguments.compiled, rounds, time_limit(arguments))
    file = "networks_compiled.csv" if arguments.compiled else "networks.csv"
    rows = environment.write_csv(arguments.results / file, found)
    print_results(rows)
    return rows
