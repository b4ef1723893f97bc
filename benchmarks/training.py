"""What each activation brings in training, and what it costs: one network, all of the family.

    python -m benchmarks training [--epochs 12] [--seeds 3] [--activations mish relu6]

The network is the demo's, a MobileNetV2 of three blocks on the handwritten digits of scikit-learn;
only its activation differs. With CReLU, which makes two channels of one, the convolutions before it
have half of the filters (Shang et al., arXiv:1603.05201). All networks of a seed start from the
same state of the random generator, see the same batches, and take turns at every step, in an order
that is drawn anew: what slows the machine slows all of them alike.

Writes training.csv, one row for each epoch, and training.png.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks import environment, options, pictures
from benchmarks.digits import BATCH_SIZE, Digits, Training, saved_megabytes
from benchmarks.small_networks import digits_network
from tests.shared.facts import ALL, Facts

QUESTION = ("Mish", "ReLU6")  # the first instead of the second


def network_of(facts: Facts, seed: int, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(seed)
    network = digits_network(facts.module, facts.widens)
    return network.to(device, memory_format=torch.channels_last)


def train(activations: list[Facts], seed: int, epochs: int, digits: Digits) -> Iterator[dict]:
    """Train all networks of one seed, and give a row for each and each epoch."""
    steps = epochs * digits.steps_per_epoch
    batch = digits.train_images[:BATCH_SIZE], digits.train_labels[:BATCH_SIZE]
    runs = {facts: Training(network_of(facts, seed, digits.device), steps) for facts in activations}
    saved = {
        facts: saved_megabytes(network_of(facts, seed, digits.device), *batch)
        for facts in activations
    }
    batches, order = torch.Generator().manual_seed(seed), random.Random(seed)
    for epoch in range(epochs):
        for images, labels in digits.batches(batches):
            for facts in order.sample(activations, len(activations)):
                runs[facts].step(images, labels)
        for facts, run in runs.items():
            run.evaluate(digits.test_images, digits.test_labels)
            yield {
                "activation": facts.title,
                "seed": seed,
                "epoch": epoch + 1,
                "loss": float(run.epoch_losses()[-1]),
                "accuracy": run.accuracies[-1],
                "ms": statistics.median(run.milliseconds[-digits.steps_per_epoch :]),
                "saved_mb": saved[facts],
                "parameters": sum(each.numel() for each in run.network.parameters()),
                "error": "",
            }


class Summary:
    """The last epochs of one activation, over the seeds."""

    def __init__(self, rows: list[dict]):
        last = max(row["epoch"] for row in rows)
        self.accuracies = [row["accuracy"] for row in rows if row["epoch"] == last]
        self.losses = [row["loss"] for row in rows if row["epoch"] == last]
        self.ms = statistics.median(row["ms"] for row in rows)
        self.saved_mb, self.parameters = rows[0]["saved_mb"], rows[0]["parameters"]


def summaries(rows: list[dict]) -> dict[str, Summary]:
    by_name = defaultdict(list)
    for row in rows:
        by_name[row["activation"]].append(row)
    return {name: Summary(found) for name, found in by_name.items()}


def spread(values: list[float]) -> float:
    """The standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_results(found: dict[str, Summary]) -> None:
    header = "", "accuracy, %", "± std", "loss", "± std", "ms a step", "MB saved", "parameters"
    lines = [
        (
            name,
            f"{statistics.mean(each.accuracies):.2f}",
            f"{spread(each.accuracies):.2f}",
            f"{statistics.mean(each.losses):.4f}",
            f"{spread(each.losses):.4f}",
            f"{each.ms:.2f}",
            f"{each.saved_mb:.2f}",
            f"{each.parameters:,}",
        )
        for name, each in found.items()
    ]
    print(f"\nTest accuracy and training loss of the last epoch, mean and spread of the seeds\n\n"
          f"{environment.table(header, lines)}")  # fmt: skip


def answer(found: dict[str, Summary]) -> str:
    """Mish instead of ReLU6: what is gained, and what it costs."""
    new, old = (found[name] for name in QUESTION)
    gain = statistics.mean(new.accuracies) - statistics.mean(old.accuracies)
    noise = max(spread(new.accuracies), spread(old.accuracies))
    if len(new.accuracies) == 1:
        verdict = "one seed says nothing of chance"
    else:
        verdict = f"{'within' if abs(gain) <= noise else 'beyond'} the spread of {noise:.2f}"
    return (
        f"training: {QUESTION[0]} instead of {QUESTION[1]}: accuracy {gain:+.2f} points, "
        f"{verdict}; training loss {statistics.mean(new.losses) / statistics.mean(old.losses):.2f} "
        f"of it, time a step {new.ms / old.ms:.2f}, bytes saved {new.saved_mb / old.saved_mb:.2f}"
    )


def draw(rows: list[dict]) -> Figure:
    """The training loss, an activation a panel, before the mean of all the others."""
    names = list(dict.fromkeys(row["activation"] for row in rows))
    losses = {
        name: np.array(
            [
                [row["loss"] for row in rows if (row["activation"], row["seed"]) == (name, seed)]
                for seed in sorted({row["seed"] for row in rows})
            ]
        )
        for name in names
    }
    found = summaries(rows)
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(2.2 * columns, 0.4 + 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names):
        for other in losses.values():
            axes.plot(np.arange(1, other.shape[1] + 1), other.mean(0), color="0.75", linewidth=0.8)
        pictures.mean_and_range(axes, losses[name], color=pictures.BLUE, linewidth=1.8)
        axes.set(yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{name}: {statistics.mean(found[name].accuracies):.1f} %")
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    figure.suptitle(
        "Training loss: mean and range of the seeds, before the others; test accuracy",
        fontsize=9.5,
    )
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)
    options.add_epochs(parser, 12)
    options.add_seeds(parser)
    options.add_activations(parser, {facts.name: facts for facts in ALL}, ALL)


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    device = environment.default_device()
    if device.type == "cpu":
        print("NO GPU: the modules call torch's own ops here; times and bytes are those.")
        torch.set_num_threads(1)  # several wait for each other on a busy machine
    digits, activations = Digits.load(device), list(dict.fromkeys(arguments.activations))
    seeds = map(
        partial(train, activations, epochs=arguments.epochs, digits=digits), range(arguments.seeds)
    )
    total = len(activations) * arguments.epochs * arguments.seeds
    rows = environment.write_csv(
        arguments.results / "training.csv",
        environment.progress((row for found in seeds for row in found), total),
    )
    found = summaries(rows)
    print_results(found)
    pictures.save(arguments.results / "training.png", partial(draw, rows))
    if found.keys() >= set(QUESTION):
        print(answer(found))
    else:
        print(f"training: trained {', '.join(found)}")
    return rows
