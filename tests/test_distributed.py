"""Two processes with gloo: DDP, FSDP2 and tensor parallelism do with our activations what they do
with torch's, and give the loss and the gradients of one process.

The processes start once and run every activation in every setup; the tests compare what came out.
A forced kernel backend that meets a DTensor: faults.py.
"""

import copy
import dataclasses
import datetime
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import fused_act
from tests.shared.cases import CASES
from tests.shared.facts import torch_swish
from tests.shared.layouts import random

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.full
PROCESSES = 2
TIMEOUT = 180  # seconds; it takes 20


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def apply(case, x):
    return case.row.Function.apply(x, *case.parameters)


# Ours, or what `replace_activations` makes ours, and torch's. A GPU runs the Functions.
ACTIVATIONS = {
    **{str(case): (Call(case.function), Call(case.torch_function)) for case in CASES},
    **{
        f"{case}-Function": (Call(functools.partial(apply, case)), Call(case.torch_function))
        for case in CASES
    },
    **{
        f"{kind.__name__}{'-inplace' * inplace}": (kind(inplace), kind(inplace))
        for kind in (nn.Mish, nn.SiLU, nn.ReLU6)
        for inplace in (False, True)
    },
    "Swish": (fused_act.Swish(1.7), Call(functools.partial(torch_swish, beta=1.7))),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """How the processes share a network of linear, activation, linear.

    Args:
        prepare: makes a network theirs, `prepare(network, mesh)`.
        sees: the placement of the DTensor that the activation gets, or None if it gets a plain one.
        splits_batch: each process takes its part of the batch.
        exact: results equal those with torch's modules, bit for bit.
        activations: those to run.
    """

    prepare: Callable[..., nn.Module]
    sees: object = None
    splits_batch: bool = False
    exact: bool = True
    activations: tuple[str, ...] = tuple(ACTIVATIONS)


def data_parallel(network, mesh):
    return DistributedDataParallel(network)


def fully_sharded(network, mesh):
    for module in (network[0], network[2], network):
        fully_shard(module, mesh=mesh)
    return network


def tensor_parallel(first, last):
    return lambda network, mesh: parallelize_module(network, mesh, {"0": first, "2": last})


def compiled(prepare, **options):
    # Dynamo decides between formula and torch: the compiler behind it has no say.
    return lambda *args: torch.compile(prepare(*args), backend="eager", **options)


def rematerialized(prepare):
    def prepared(*args):
        model = prepare(*args)

        def run(x):
            with fused_act.rematerialize():
                return model(x)

        return run

    return prepared


columns = functools.partial(ColwiseParallel, use_local_output=False)
rows = functools.partial(RowwiseParallel, use_local_output=False)
with_formula = ("mish", "swish-1.702")

SETUPS = {
    "DDP": Setup(data_parallel, splits_batch=True),
    "FSDP2": Setup(fully_sharded, splits_batch=True),
    "local": Setup(tensor_parallel(ColwiseParallel(), RowwiseParallel())),
    "columns": Setup(tensor_parallel(columns(), RowwiseParallel()), Shard(1)),
    "sequence": Setup(
        tensor_parallel(
            columns(output_layouts=Shard(0)),
            RowwiseParallel(input_layouts=Shard(0)),
        ),
        Shard(0),
    ),
    "replicated": Setup(
        tensor_parallel(
            columns(output_layouts=Replicate()),
            RowwiseParallel(input_layouts=Replicate()),
        ),
        Replicate(),
    ),
    "partial": Setup(
        tensor_parallel(
            rows(input_layouts=Replicate(), output_layouts=Partial()),
            ColwiseParallel(input_layouts=Partial(), output_layouts=Replicate()),
        ),
        Partial(),
    ),
    "rematerialized DDP": Setup(rematerialized(data_parallel), splits_batch=True),
    "rematerialized FSDP2": Setup(rematerialized(fully_sharded), splits_batch=True),
    "compiled DDP": Setup(
        compiled(data_parallel), splits_batch=True, exact=False, activations=with_formula
    ),
    "compiled columns": Setup(
        compiled(tensor_parallel(columns(), RowwiseParallel()), fullgraph=True),
        Shard(1),
        activations=with_formula,
    ),
}
RUNS = [(setup, name) for setup in SETUPS for name in SETUPS[setup].activations]

# What torch 2.13 does not do with a DTensor: differentiate ReLU6, and write in place what has to
# move or is a view.
REFUSALS = r"hardtanh_backward|in-place operations|modified inplace"


def batch():
    return random(4, 6, generator=torch.Generator().manual_seed(0))


def network(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), copy.deepcopy(activation), nn.Linear(8, 4))


def train(model, parameters, x):
    """The loss and all gradients, gathered, or the error."""
    try:
        loss = model(x).square().mean()
        loss.backward()
    except RuntimeError as error:
        return {"error": str(error).partition("\n")[0]}
    result = {"loss": loss.detach()}
    for name, parameter in parameters:
        grad = parameter.grad
        result[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return result


def run(setup, model, mesh):
    """The placements that the activation has seen, as text, and what `train` gives."""
    seen = []
    model[1].register_forward_pre_hook(
        lambda module, args: seen.append(getattr(args[0], "placements", None))
    )
    x = batch().chunk(PROCESSES)[mesh.get_rank()] if setup.splits_batch else batch()
    result = train(setup.prepare(model, mesh), list(model.named_parameters()), x)
    if setup.splits_batch:
        distributed.all_reduce(result["loss"].div_(PROCESSES))
    return str(seen), result


def work(rank: int, folder: Path):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (PROCESSES,))
    results = {}
    for setup, name in RUNS:
        ours, theirs = map(network, ACTIVATIONS[name])
        fused_act.replace_activations(ours)
        assert not type(ours[1]).__module__.startswith("torch."), name
        try:
            results[setup, name] = [run(SETUPS[setup], model, mesh) for model in (ours, theirs)]
        except Exception as error:
            raise RuntimeError(f"{setup}, {name}") from error
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of both processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    with pytest.MonkeyPatch.context() as patch:
        # torch 2.13 settles ties between placements by the order of sets: with hashes of their own,
        # the processes at times call different collectives in the backward of a Partial DTensor.
        patch.setenv("PYTHONHASHSEED", "0")
        context = torch.multiprocessing.spawn(work, (folder,), PROCESSES, join=False)
    try:
        end = time.monotonic() + TIMEOUT
        while not context.join(timeout=max(0, end - time.monotonic())):
            assert time.monotonic() < end, f"the processes have not ended within {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize(("setup", "name"), RUNS)
def test_two_processes_are_torchs_and_one(results, setup, name):
    alone = network(ACTIVATIONS[name][1])
    expected = train(alone, alone.named_parameters(), batch())
    sees, tolerance = SETUPS[setup].sees, {"rtol": 0, "atol": 0} if SETUPS[setup].exact else {}
    for of_one_process in results:
        (our_seen, ours), (their_seen, theirs) = of_one_process[setup, name]
        assert our_seen == their_seen == str([sees and (sees,)])
        if "error" in theirs:
            assert ours == theirs
            assert re.search(REFUSALS, theirs["error"])
            continue
        assert ours.keys() == theirs.keys() == expected.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], **tolerance)
            torch.testing.assert_close(value, expected[key])
