"""The handwritten digits of scikit-learn, and the training of small networks on them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

BATCH_SIZE = 64
LEARNING_RATE = 0.1  # the peak of its one cycle


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: images in [0, 1] and their labels, 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, device: torch.device) -> Digits:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 16
        train_images, test_images, train_labels, test_labels = train_test_split(
            images, labels, test_size=0.25, stratify=labels, random_state=0
        )
        arrays = (train_images, train_labels, test_images, test_labels)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_labels) // BATCH_SIZE

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order; what does not fill a batch is left out."""
        order = torch.randperm(len(self.train_labels), generator=generator)
        order = order[: self.steps_per_epoch * BATCH_SIZE].to(self.device)
        for indices in order.split(BATCH_SIZE):
            yield self.train_images[indices], self.train_labels[indices]


class Training:
    """One network in training, and what is measured on the way."""

    def __init__(self, network: nn.Module, steps: int):
        self.network = network
        self.optimizer = torch.optim.SGD(
            network.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )
        self.losses: list[float] = []  # of each step
        self.milliseconds: list[float] = []  # of each step
        self.accuracies: list[float] = []  # of each epoch, in percent

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        self.optimizer.step()
        # Reading the loss waits until a GPU has done the whole step.
        self.losses.append(loss.item())
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        self.scheduler.step()

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        self.network.eval()
        correct = self.network(images).argmax(1) == labels
        self.accuracies.append(100 * correct.float().mean().item())
        self.network.train()

    def epoch_losses(self) -> np.ndarray:
        return np.reshape(self.losses, (len(self.accuracies), -1)).mean(1)


def saved_megabytes(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """What one training step keeps from forward for backward.

    Counted are the storages of all tensors that autograd saves: what the convolutions, the norms,
    the activations and the loss need again, the batch included. A storage that several of them
    save counts once. Parameters and buffers do not count, as the network holds them anyway.
    """
    held = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(network.parameters(), network.buffers())
    }
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The loss keeps alive what is saved, so no address is that of two storages.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(network(images), labels)
    loss.backward()
    return sum(saved.values()) / 1e6
