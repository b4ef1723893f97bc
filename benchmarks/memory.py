"""How much memory the activations hold for backward, next to everything a user could pick instead.

    python -m benchmarks memory [--dtypes bf16 fp32] [--compile-networks]

An activation seldom stands alone: what the next layer saves as well costs nothing more. All figures
are bytes for each element that an activation computes:

- alone: `activation(x.clone())`, where only the activation can keep the clone;
- conv-act-conv: 1 x 1 convolutions around it. The second saves the activation's output, whoever
  computes it. Parameters and the input do not count;
- the others: training steps of small networks, where convolutions, linear layers and norms save
  theirs too. Compiled networks take minutes, so they have to be asked for.

PReLU and the learnable Swish have one weight in each place. CReLU makes two channels of one, so a
layer before it has half of the filters, and CReLU computes as many elements as the others there.
csp, efficientnet and swiglu do without CReLU: their layers expect as many channels as go in.

saved is what the nodes of the graph keep beyond parameters and input, each storage once: masks, and
what activations, norms, layers (convolutions and linear layers) and others keep besides; what two
keep counts for the first of these. Compiled code is a single node, which counts among the others.
Of checkpoints, whose nodes do not tell, it is what is allocated in forward and not freed, but for
the output. peak, on a GPU, is the most on the way through forward and backward. ms is such a step
of a network, on a GPU that of the device alone where its launches fit into the queue; all take
turns. `networks` tells what larger networks gain.

rematerialize and rematerialize-norm are fused_act's block of that name, without and with `norm`,
around forward. checkpoint is `torch.utils.checkpoint` of every layer of the network. Compiled code
is not repeated in place, as the compiler makes the same of both; it compiles the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fused_act
from benchmarks import environment, options, providers, small_networks, timing
from benchmarks.providers import DEVICE, DTYPES, Provider
from fused_act.backends.triton import INTERPRET
from fused_act.families.base import Row
from fused_act.rematerialization import way
from tests.shared.facts import FACTS

CHANNELS = 32
ON_GPU = DEVICE.type == "cuda"
# Small on a CPU, and smaller in Triton's interpreter, which takes a second for 2^20 elements.
SHAPE = (64, CHANNELS, 128, 64) if ON_GPU else (4, CHANNELS, 16, 8)
IMAGES = (256, 1, 64, 64) if ON_GPU else (2, 1, 16, 16) if INTERPRET else (4, 1, 48, 48)
TOKENS = (64, 512, 64) if ON_GPU else (1, 16, 64) if INTERPRET else (4, 64, 64)
# Turns of each network, and their length. On a GPU `networks` takes its time, of larger ones.
ROUNDS, SECONDS = (5, 0.01) if ON_GPU else (9, 0.05)


class Call(nn.Module):
    """A function as a module. The weight that follows `x`, if there is one, is its parameter."""

    def __init__(self, function: Callable[..., Tensor], *weights: Tensor):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(*weights) if weights else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.weight is None else self.function(x, self.weight)


class Alone(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module], widens: int):
        super().__init__()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x.clone())


def conv_act_conv(activation: Callable[[], nn.Module], widens: int) -> nn.Sequential:
    first = nn.Conv2d(CHANNELS, CHANNELS // widens, 1, bias=False)
    second = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
    return nn.Sequential(first, activation(), second)


@dataclasses.dataclass(frozen=True)
class Model:
    """What an activation is measured in: itself alone, between two layers, or a network.

    Args:
        build: makes it of what makes its activations and, where it `can_widen`, of how many
            channels these make of one.
        shape: that of its input.
    """

    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    is_network: bool = True
    can_widen: bool = True

    def can_have(self, activation: Row) -> bool:
        return self.can_widen or FACTS[activation.name].widens == 1

    def module(self, make: Callable[[], nn.Module], activation: Row) -> nn.Module:
        """The model with `activation`, of which `make` makes one."""
        widens = (FACTS[activation.name].widens,) if self.can_widen else ()
        return self.build(make, *widens)


MODELS = {
    "alone": Model(Alone, SHAPE, is_network=False),
    "conv-act-conv": Model(conv_act_conv, SHAPE, is_network=False),
    "conv-act stack": Model(partial(small_networks.stack, norm=False), IMAGES),
    "conv-norm-act stack": Model(partial(small_networks.stack, norm=True), IMAGES),
    "mobilenet_v2": Model(small_networks.digits_network, IMAGES),
    "csp": Model(small_networks.csp_network, IMAGES, can_widen=False),
    "efficientnet": Model(small_networks.efficientnet, IMAGES, can_widen=False),
    "swiglu": Model(small_networks.swiglu_mlp, TOKENS, can_widen=False),
}


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        for layer in module:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    return forward


# What a user of each can do besides, in networks: how it runs a module, and in which block.
METHODS = {
    "": (lambda module: module, contextlib.nullcontext),
    "rematerialize": (lambda module: module, fused_act.rematerialize),
    "rematerialize-norm": (lambda module: module, partial(fused_act.rematerialize, norm=True)),
    "checkpoint": (checkpointed, contextlib.nullcontext),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A provider, in place or not, with one of METHODS."""

    provider: Provider
    inplace: bool
    method: str

    def can(self, activation: Row, model: Model, compile_networks: bool) -> bool:
        if self.provider.function(activation, self.inplace) is None:
            return False
        if self.provider.compiles:
            asked = compile_networks or not model.is_network
            return asked and not self.inplace and not self.method
        if self.method == "checkpoint":
            asked = model.is_network and not INTERPRET  # which allocates, too
            return asked and self.provider.name == "aten" and not self.inplace
        return not self.method or (self.provider.is_ours and not self.inplace)


@contextlib.contextmanager
def allocated(found: dict[str, int]) -> Iterator[None]:
    """Put into `found` the bytes that are allocated inside and not freed, and the most there were.

    On a CPU nobody knows the most.
    """
    if not ON_GPU:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        found["held"] = sum(event.self_cpu_memory_usage for event in profiler.events())
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    found["held"] = torch.cuda.memory_allocated() - before
    found["peak"] = torch.cuda.max_memory_allocated() - before


# Who saves, by the names of their nodes; masks by their dtype, activations by `nodes_of_calls`.
KINDS = {
    "masks": (),
    "by_activations": (),
    "by_norms": ("Norm",),
    "by_layers": ("Convolution", "Addmm", "Mm", "Bmm"),
    "by_others": ("",),
}


def nodes_behind(last: Node | None, first: Node | None = None) -> set[Node]:
    """The nodes of the graph that ends with `last`, up to `first`, which is not among them."""
    nodes, visited = [last], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node is not first and node not in visited:
            visited.add(node)
            nodes += [following for following, _ in node.next_functions]
    return visited


@contextlib.contextmanager
def nodes_of_calls(module: nn.Module) -> Iterator[set[Node]]:
    """Put the nodes that the activations of `module` make inside into a set.

    Names do not tell whose they are: a definition in torch's ops multiplies, and so does a gate.
    """
    found, firsts = set(), []

    def before(call: Call, inputs: tuple[Tensor]) -> None:
        firsts.append(inputs[0].grad_fn)  # after a call in place it is that of the output

    def behind(call: Call, inputs: tuple[Tensor], output: Tensor) -> None:
        found.update(nodes_behind(output.grad_fn, firsts.pop()))

    with contextlib.ExitStack() as hooks:
        for call in module.modules():
            if isinstance(call, Call):
                hooks.enter_context(call.register_forward_pre_hook(before))
                hooks.enter_context(call.register_forward_hook(behind))
        yield found


def saved_by(output: Tensor, not_counted: set[int], activations: set[Node]) -> dict[str, int]:
    """Bytes of the storages that the graph behind `output` keeps, by who has saved them.

    Args:
        not_counted: the addresses of storages that are there anyway.
        activations: the nodes that are theirs.
    """
    kept = {kind: {} for kind in KINDS}
    for node in nodes_behind(output.grad_fn):
        own = next(
            kind
            for kind, names in KINDS.items()
            if (kind == "by_activations" and node in activations)
            or any(name in node.name() for name in names)
        )
        for tensor in kept_by(node):
            kind = "masks" if tensor.dtype in (torch.uint8, torch.bool) else own
            storage = tensor.untyped_storage()
            kept[kind][storage.data_ptr()] = storage.nbytes()
    bytes_ = {}
    for kind, storages in kept.items():
        own = storages.keys() - not_counted
        bytes_[kind] = sum(storages[address] for address in own)
        not_counted = not_counted | own
    return bytes_


def kept_by(node: Node) -> Iterator[Tensor]:
    """The tensors that a node keeps; not those that are computed again."""
    names = [name for name in dir(node) if name.startswith("_raw_saved_")]
    if hasattr(node, "saved_tensors"):  # of a torch.autograd.Function
        names = ["_raw_saved_tensors"]
    for name in names:
        saved = getattr(node, name)
        for each in saved if isinstance(saved, tuple) else (saved,):
            # Without hooks the tensor itself, or None.
            tensor = each.data.tensor if isinstance(each.data, way().Kept) else each.data
            if isinstance(tensor, Tensor):
                yield tensor


def activation_numel(model: Model, activation: Row) -> int:
    """The elements that all activations of a model compute."""
    numels = []

    def count(x: Tensor) -> Tensor:
        y = torch.cat([x] * FACTS[activation.name].widens, 1)
        numels.append(y.numel())
        return y

    model.module(lambda: Call(count), activation)(torch.zeros(model.shape))
    return sum(numels)


class Run:
    """A contender's activation in a model, ready to run."""

    def __init__(self, contender: Contender, activation: Row, dtype: torch.dtype, model: Model):
        self.contender = contender
        provider = contender.provider
        torch.manual_seed(0)
        x = torch.randn(model.shape, dtype=dtype, device=DEVICE)
        # The layout that Inductor gives convolutions; it would save a converted copy of the input.
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        self.x = x.to(memory_format=layout).requires_grad_(not model.is_network)
        function = provider.function(activation, contender.inplace)
        module = model.module(
            lambda: Call(function, *providers.weights(activation)), activation
        ).to(DEVICE, dtype, memory_format=layout)
        self.parameters = [*module.parameters(), *([] if model.is_network else [self.x])]
        self.not_counted = [*module.parameters(), *module.buffers()]
        if model is not MODELS["alone"]:  # there compiled code drops the clone and saves x instead
            self.not_counted.append(self.x)
        wrap, self.block = METHODS[contender.method]
        self.eager = module
        self.module = provider.prepare(wrap(module))
        # Compiles what is to be compiled, and lets libraries take their workspaces.
        self.grad_output = torch.ones_like(self.forward())
        self.step()

    def forward(self) -> Tensor:
        with self.contender.provider.selected(), self.block():
            return self.module(self.x)

    def calls(self) -> contextlib.AbstractContextManager[set[Node]]:
        """`nodes_of_calls`, but for compiled code, which would be compiled again."""
        if self.contender.provider.compiles:
            return contextlib.nullcontext(set())
        return nodes_of_calls(self.eager)

    def step(self) -> None:
        torch.autograd.grad(self.forward(), self.parameters, self.grad_output)

    def bytes(self) -> dict[str, int]:
        found = {}
        if self.contender.method == "checkpoint":
            with allocated(found):
                output = self.forward()
            figures = {"saved_bytes": found["held"] - output.untyped_storage().nbytes()}
        else:
            with self.calls() as nodes:
                output = self.forward()
            addresses = {tensor.untyped_storage().data_ptr() for tensor in self.not_counted}
            figures = saved_by(output, addresses, nodes)
            figures["saved_bytes"] = sum(figures.values())
            nodes.clear()
        del output
        if ON_GPU:
            with allocated(found):
                self.step()
            figures["peak_bytes"] = found["peak"]
        return figures


def rows_of(activation: Row, dtype: str, name: str, contenders: list[Contender]) -> list[dict]:
    """The rows of one model: bytes for each element that an activation computes, and times."""
    model = MODELS[name]
    numel = activation_numel(model, activation)
    rows, runs = {}, {}
    for contender in contenders:
        rows[contender] = {
            "provider": contender.provider.name,
            "method": contender.method,
            "activation": activation.name,
            "dtype": dtype,
            "case": name,
            "inplace": contender.inplace,
            "numel": numel,
            **dict.fromkeys(("saved_bytes", *KINDS, "peak_bytes", "ms", "error"), ""),
        }
        try:
            run = Run(contender, activation, DTYPES[dtype], model)
            figures = run.bytes()
        except Exception as error:
            rows[contender]["error"] = providers.error_text(error)
            continue
        rows[contender] |= {column: bytes_ / numel for column, bytes_ in figures.items()}
        runs[contender] = run.step
    if model.is_network and not INTERPRET:
        turn = timing.gpu_turn if ON_GPU else timing.cpu_turn
        for contender, seconds in timing.interleaved(runs, ROUNDS, SECONDS, turn).items():
            rows[contender]["ms"] = 1000 * seconds
    return list(rows.values())


def measure_all(arguments: argparse.Namespace, compared: list[Provider]) -> Iterator[dict]:
    cases = [
        (activation, dtype, name)
        for activation, dtype, name in itertools.product(
            dict.fromkeys(arguments.activations), arguments.dtypes, MODELS
        )
        if MODELS[name].can_have(activation)
    ]
    for activation, dtype, name in environment.progress(cases, len(cases)):
        contenders = [
            contender
            for contender in itertools.starmap(
                Contender, itertools.product(compared, (False, True), METHODS)
            )
            if contender.can(activation, MODELS[name], arguments.compile_networks)
        ]
        yield from rows_of(activation, dtype, name, contenders)


def print_results(rows: list[dict]) -> None:
    """Each case under the others: bytes, the share of what torch's own op saves, and the time."""
    torchs = {
        (row["activation"], row["dtype"], row["case"]): row
        for row in rows
        if row["provider"] == "aten" and not row["method"] and not row["inplace"]
    }
    columns = ("saved_bytes", *KINDS, *(["peak_bytes"] if ON_GPU else []))
    lines, last = [], None
    for row in rows:
        if row["error"]:
            continue
        key = row["activation"], row["dtype"], row["case"]
        own = torchs.get(key, {})
        figures = [f"{row[column]:.3f}" if row[column] != "" else "" for column in columns]
        share = f"{row['saved_bytes'] / own['saved_bytes']:.0%}" if own.get("saved_bytes") else ""
        time = f"{row['ms'] / own['ms']:.2f}" if row["ms"] and own.get("ms") else ""
        inplace = "in place" if row["inplace"] else ""
        who = " ".join(filter(None, (row["provider"], row["method"], inplace)))
        lines.append((" ".join(key) if key != last else "", who, *figures, share, time))
        last = key
    print("\nBytes for each element that an activation computes\n")
    header = ("", "", "saved", *(kind.replace("_", " ") for kind in KINDS))
    header += (*(["peak"] if ON_GPU else []), "of aten's", "time of aten's")
    print(environment.table(header, lines))
    providers.print_errors(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)
    options.add_dtypes(parser, ["bf16"])
    options.add_activations(parser)
    parser.add_argument(
        "--compile-networks", action="store_true", help="compile the networks, too; takes minutes"
    )


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    compared = providers.available()
    if not ON_GPU:
        print("NO GPU: no CUDA C++ kernel ran. Times are those of one CPU thread.")
        if not INTERPRET:
            compared.insert(0, providers.FALLBACK)
        torch.set_num_threads(1)
    rows = environment.write_csv(arguments.results / "memory.csv", measure_all(arguments, compared))
    print_results(rows)
    return rows
