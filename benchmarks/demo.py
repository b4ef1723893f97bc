"""A first look at fused_act: train small networks with it, draw its functions, time its backends.

    python -m benchmarks demo [--epochs 6] [--seeds 3]

Each network is trained twice from the same start: with torch's own activation modules, and with
fused_act's in their place. Takes about a minute on a CPU; where a CUDA GPU is, all runs there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import fused_act
from benchmarks import environment, options, pictures
from benchmarks.digits import BATCH_SIZE, Digits, Training, saved_megabytes
from benchmarks.pictures import BLUE, GREEN, VERMILLION
from benchmarks.small_networks import digits_network
from fused_act import dispatch
from fused_act.backends.triton import INTERPRET
from tests.shared.facts import FACTS

TIMED = {"cpu": (2**20, torch.float32), "cuda": (2**26, torch.bfloat16)}
TIMING_ROUNDS = 9
DIRECTIONS = ("forward", "forward\n+ backward")
OWN, COMPILED, COMPILED_OWN = "torch's own op", "compiled fused_act", "compiled torch op"


@dataclasses.dataclass(frozen=True)
class Activation:
    """One activation: fused_act's, torch's own, and the formula as it is typed without them."""

    name: str
    formula: str
    function: Callable[[Tensor], Tensor]
    torch_function: Callable[[Tensor], Tensor]
    torch_module: type[nn.Module]
    naive: Callable[[Tensor], Tensor]
    color: str
    window: tuple[float, float, float, float]  # of its picture: left, right, bottom, top


ACTIVATIONS = (
    Activation(
        name="ReLU6",
        formula=r"$\min(\max(x, 0), 6)$",
        function=fused_act.relu6,
        torch_function=F.relu6,
        torch_module=nn.ReLU6,
        naive=FACTS["relu6"].naive,
        color=BLUE,
        window=(-4, 10, -0.7, 7),
    ),
    Activation(
        name="Swish",
        formula=r"$x\,\mathrm{sigmoid}(x)$",
        function=fused_act.swish,
        torch_function=F.silu,
        torch_module=nn.SiLU,
        naive=FACTS["swish"].naive,
        color=VERMILLION,
        window=(-5, 3, -0.7, 3),
    ),
    Activation(
        name="Mish",
        formula=r"$x\,\tanh(\mathrm{softplus}(x))$",
        function=fused_act.mish,
        torch_function=F.mish,
        torch_module=nn.Mish,
        naive=FACTS["mish"].naive,
        color=GREEN,
        window=(-5, 3, -0.7, 3),
    ),
)


Twins = dict[str, Training]  # whose activation modules, "torch" or "fused_act" -> the training
Trained = dict[str, list[Twins]]  # activation -> the twins of each seed


def twin_networks(activation: Activation, seed: int, device: torch.device) -> dict[str, nn.Module]:
    """A network with torch's modules and its copy with fused ones: the same weights in both."""
    torch.manual_seed(seed)
    network = digits_network(activation.torch_module).to(device, memory_format=torch.channels_last)
    fused_network = fused_act.replace_activations(copy.deepcopy(network))
    return {"torch": network, "fused_act": fused_network}


def train_twins(
    activation: Activation, seed: int, epochs: int, digits: Digits, progress: tqdm
) -> Twins:
    """Train both networks, taking turns at each step: a busy machine slows both alike."""
    networks = twin_networks(activation, seed, digits.device)
    steps = epochs * digits.steps_per_epoch
    twins = {modules: Training(network, steps) for modules, network in networks.items()}
    turns = list(twins.values())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for images, labels in digits.batches(generator):
            for training in turns:
                training.step(images, labels)
            turns.reverse()  # who goes second finds the batch in the cache
        for training in turns:
            training.evaluate(digits.test_images, digits.test_labels)
        progress.update()
    return twins


def require_equal_losses(activation: Activation, seed: int, twins: Twins) -> None:
    """On a CPU the fused modules promise torch's own bits; end the program if they differ."""
    pairs = zip(twins["fused_act"].losses, twins["torch"].losses)
    for step, (fused, own) in enumerate(pairs):
        if fused != own:
            sys.exit(
                "demo: FAILED: on a CPU every loss must be torch's own, but that of "
                f"{activation.name}, seed {seed}, step {step} is {fused!r} with fused_act's "
                f"modules and {own!r} with torch's."
            )


def train_all(digits: Digits, epochs: int, seeds: int, trained: Trained) -> Iterator[dict]:
    """Train all twins, put them into `trained`, and give a row for each network and epoch."""
    with tqdm(total=len(ACTIVATIONS) * seeds * epochs, unit="epoch", leave=False) as progress:
        for activation in ACTIVATIONS:
            trained[activation.name] = []
            for seed in range(seeds):
                progress.set_description(f"training with {activation.name}, seed {seed}")
                twins = train_twins(activation, seed, epochs, digits, progress)
                if digits.device.type == "cpu":
                    require_equal_losses(activation, seed, twins)
                trained[activation.name].append(twins)
                for modules, run in twins.items():
                    for epoch, loss in enumerate(run.epoch_losses()):
                        yield {
                            "activation": activation.name,
                            "modules": modules,
                            "seed": seed,
                            "epoch": epoch + 1,
                            "loss": f"{loss:.6g}",
                            "accuracy": f"{run.accuracies[epoch]:.2f}",
                        }


def training_row(
    activation: Activation, modules: str, trained: Trained, megabytes: float
) -> tuple[str, ...]:
    runs = [twins[modules] for twins in trained[activation.name]]
    accuracies = [run.accuracies[-1] for run in runs]
    spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
    milliseconds = statistics.median(ms for run in runs for ms in run.milliseconds)
    accuracy = f"{statistics.mean(accuracies):.2f} ± {spread:.2f}"
    return activation.name, modules, accuracy, f"{milliseconds:.2f}", f"{megabytes:.2f}"


def training_table(trained: Trained, digits: Digits) -> str:
    batch = digits.train_images[:BATCH_SIZE], digits.train_labels[:BATCH_SIZE]
    rows = [
        training_row(activation, modules, trained, saved_megabytes(network, *batch))
        for activation in ACTIVATIONS
        for modules, network in twin_networks(activation, 0, digits.device).items()
    ]
    headers = (
        "activation",
        "modules",
        "test accuracy, %\nmean ± std",
        "ms per step\nmedian",
        "MB saved\nfor backward",
    )
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 3))


def comparison_of_losses(trained: Trained, device: torch.device) -> str:
    pairs = [
        (fused, own)
        for seeds in trained.values()
        for twins in seeds
        for fused, own in zip(twins["fused_act"].losses, twins["torch"].losses)
    ]
    if device.type == "cpu":
        return (
            f"All {len(pairs):,} losses with fused_act's modules equal those with torch's, bit for "
            "bit: on a CPU the modules call torch's own ops, so time and memory are torch's too."
        )
    largest = max(abs(fused - own) for fused, own in pairs)
    return (
        f"The largest difference between a loss with fused_act's modules and the same step's with "
        f"torch's is {largest:.2g}, over {len(pairs):,} steps."
    )


def function_and_derivative(activation: Activation, device: torch.device) -> tuple[np.ndarray, ...]:
    left, right, *_ = activation.window
    x = torch.linspace(left, right, 4001, device=device, requires_grad=True)
    y = activation.function(x)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    return tuple(tensor.detach().cpu().numpy() for tensor in (x, y, derivative))


def draw_activation(axes: Axes, activation: Activation, device: torch.device) -> None:
    x, y, derivative = function_and_derivative(activation, device)
    jumps = np.flatnonzero(np.abs(np.diff(derivative)) > 0.5)
    axes.vlines(x[jumps], 0, 1, color=VERMILLION, linewidth=0.8, linestyles="dotted")
    # A point without a value parts the line, which would join the sides of a jump by a slope.
    derivative[jumps + 1] = np.nan
    axes.plot(x, y, color=BLUE, linewidth=1.8, label="function")
    dashes = (0, (4, 1.5))
    axes.plot(x, derivative, color=VERMILLION, linewidth=1.8, linestyle=dashes, label="derivative")
    left, right, bottom, top = activation.window
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_title(f"{activation.name}: {activation.formula}")
    axes.xaxis.set_major_locator(MultipleLocator(2))
    axes.yaxis.set_major_locator(MultipleLocator(1))
    pictures.axes_through_origin(axes)


def draw_curves(device: torch.device) -> Figure:
    """Each activation and its derivative as autograd gives it, on axes through the origin."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, activation in zip(figure.subplots(1, len(ACTIVATIONS)), ACTIVATIONS):
        draw_activation(axes, activation, device)
    handles = figure.axes[0].get_lines()[:2]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_training(trained: Trained) -> Figure:
    """The fused networks: the mean over the seeds, in a band from the least to the greatest."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for activation in ACTIVATIONS:
        runs = [twins["fused_act"] for twins in trained[activation.name]]
        line = {"color": activation.color, "label": activation.name, "linewidth": 1.8}
        pictures.mean_and_range(loss_axes, np.array([run.epoch_losses() for run in runs]), **line)
        pictures.mean_and_range(accuracy_axes, np.array([run.accuracies for run in runs]), **line)
    loss_axes.set(title="Training loss", xlabel="epoch", yscale="log")
    accuracy_axes.set(title="Test accuracy, %", xlabel="epoch", ylim=(90, 100.3))
    seeds = "1 seed" if len(runs) == 1 else f"mean and range\nof {len(runs)} seeds"
    accuracy_axes.legend(loc="lower right", title=seeds, alignment="left", frameon=False)
    return figure


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute an activation: a function, called while `backend` is selected."""

    name: str
    function: Callable[[Tensor], Tensor]
    backend: str = "auto"


def timed_backends() -> list[str]:
    """All that are available but Triton's interpreter, whose time says nothing of a kernel."""
    available = fused_act.available_backends()
    return [name for name in available if not (name == "triton" and INTERPRET)]


def contenders(activation: Activation, x: Tensor, failures: set[str]) -> list[Contender]:
    """All that can compute `activation`; why one does not compile is added to `failures`."""
    found = [Contender(OWN, activation.torch_function)]
    for backend in timed_backends():
        found.append(Contender(f"fused_act, backend {backend!r}", activation.function, backend))
    for name, function in (
        (COMPILED, activation.function),
        (COMPILED_OWN, activation.torch_function),
    ):
        compiled = torch.compile(function)
        reason = reason_not_to_compile(compiled, x)
        if reason is None:
            found.append(Contender(name, compiled))
        else:
            failures.add(reason)
    found.append(Contender("naive formula", activation.naive))
    return found


def reason_not_to_compile(compiled: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """Compile for inference and for training; the first line of the error if one of them fails."""
    try:
        compiled(x)
        compiled(x.clone().requires_grad_()).sum().backward()
    except Exception as error:  # where no compiler works, Inductor raises one of many types
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def make_timer(function: Callable[[Tensor], Tensor], x: Tensor, direction: str) -> Timer:
    names = {"f": function, "x": x}
    statement = "f(x)"
    if direction != "forward":
        names |= {"x": x.clone().requires_grad_(), "grad_output": torch.ones_like(x)}
        statement = "torch.autograd.grad(f(x), x, grad_output)"
    return Timer(statement, globals=names, num_threads=torch.get_num_threads())


def measure(x: Tensor, direction: str, candidates: list[Contender]) -> dict[str, float]:
    """Seconds by name: the median of a short turn, in the best of some rounds of turns.

    What else the machine does only adds time, and never to all of a contender's turns.
    """
    timers = [make_timer(contender.function, x, direction) for contender in candidates]
    best = {contender.name: math.inf for contender in candidates}
    for _ in range(TIMING_ROUNDS):
        for contender, timer in zip(candidates, timers):
            with fused_act.use_backend(contender.backend):
                turn = timer.blocked_autorange(min_run_time=0.02)
            best[contender.name] = min(best[contender.name], turn.median)
    return best


def measure_all(device: torch.device, failures: set[str]) -> dict[str, dict[str, float]]:
    """By activation and direction, which is the header of a column, what `measure` returns."""
    numel, dtype = TIMED[device.type]
    x = torch.randn(numel, device=device).to(dtype)
    columns = {}
    with tqdm(total=len(ACTIVATIONS), unit="activation", leave=False) as progress:
        for activation in ACTIVATIONS:
            progress.set_description(f"compiling and timing {activation.name}")
            candidates = contenders(activation, x, failures)
            for direction in DIRECTIONS:
                columns[f"{activation.name}\n{direction}"] = measure(x, direction, candidates)
            progress.update()
    return columns


def speed_cell(seconds: dict[str, float], name: str) -> str:
    if name == OWN:
        return f"{1e3 * seconds[OWN]:.3g} ms"
    return f"{seconds[name] / seconds[OWN]:.2f}" if name in seconds else "-"


def speed_table(columns: dict[str, dict[str, float]]) -> str:
    names = max(columns.values(), key=len)  # some contenders may not have compiled everywhere
    rows = [(name, *(speed_cell(seconds, name) for seconds in columns.values())) for name in names]
    alignment = ("left", *["right"] * len(columns))
    return tabulate(rows, ("", *columns), disable_numparse=True, colalign=alignment)


def missing_kernels(device: torch.device, has_compiled: bool) -> list[str]:
    """Which kernels did not run, a sentence each."""
    if device.type == "cpu":
        what_ran = "torch's own op and the compiled formula" if has_compiled else "torch's own op"
        return [f"No CUDA GPU: the Triton and CUDA kernels did not run; what ran is {what_ran}."]
    reasons = {name: each.unavailable() for name, each in dispatch.BACKENDS.items()}
    return [f"No {name} kernel ran: {reason}." for name, reason in reasons.items() if reason]


def summary(device: torch.device, pairs: int, results: Path) -> str:
    return (
        f"Trained {pairs} pairs of networks and timed {len(ACTIVATIONS)} activations on "
        f"{environment.device_name(device)} with torch {torch.__version__}; the pictures are "
        f"{results / 'curves.png'} and {results / 'demo.png'}."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser, "demo")
    options.add_epochs(parser, 6)
    options.add_seeds(parser)


def main(arguments: argparse.Namespace) -> list[dict]:
    results = arguments.results
    device = environment.default_device()
    # The tensors are small: two threads save a third of a step on idle cores, but on busy ones,
    # where each waits for the other to get its turn, a step took 20 times as long.
    torch.set_num_threads(1)
    # On a GPU only the activations are to differ between the twins.
    torch.backends.cudnn.deterministic = True

    digits = Digits.load(device)
    trained: Trained = {}
    rows = environment.write_csv(
        results / "demo.csv", train_all(digits, arguments.epochs, arguments.seeds, trained)
    )
    print(
        f"\nA MobileNetV2 of three blocks on {len(digits.train_labels):,} handwritten digits, fp32 "
        f"(epochs: {arguments.epochs}, seeds: {arguments.seeds}, batch size: {BATCH_SIZE})\n"
    )
    print(training_table(trained, digits))
    print(f"\n{comparison_of_losses(trained, device)}")
    pictures.save(results / "curves.png", partial(draw_curves, device))
    pictures.save(results / "demo.png", partial(draw_training, trained))

    failures: set[str] = set()
    columns = measure_all(device, failures)
    numel, dtype = TIMED[device.type]
    print(
        f"\nTime for {numel:,} elements in {str(dtype).removeprefix('torch.')}: of torch's own op "
        "in ms, of the others as a multiple of that (below 1 is faster)\n"
    )
    print(speed_table(columns), end="\n\n")
    for reason in sorted(failures):
        print(f"torch.compile failed: {reason}")
    has_compiled = any(COMPILED in seconds for seconds in columns.values())
    for sentence in missing_kernels(device, has_compiled):
        print(sentence)
    print(summary(device, len(trained) * arguments.seeds, results))
    return rows
