"""Threads, forked and spawned workers. Streams and graphs: test_gpu.py."""

import concurrent.futures
import multiprocessing
import os

import pytest
import torch

import fused_act
from tests.shared.cases import ALL_CASES, all_rows

THREADS = 8


def forward_backward(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@all_rows
@pytest.mark.parametrize("prepare", [lambda f: f, torch.compile], ids=["eager", "compiled"])
def test_threads_equal_serial(case, prepare):
    function = prepare(case.function)
    inputs = [4 * torch.randn(257 + i) for i in range(4 * THREADS)]
    for x in inputs[:3]:  # threads that compile at once exhaust Dynamo's recompilations
        forward_backward(function, x)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        parallel = list(pool.map(lambda x: forward_backward(function, x), inputs))
    for ours, x in zip(parallel, inputs):
        for a, b in zip(ours, forward_backward(function, x)):
            assert torch.equal(a, b)


def test_threads_share_a_module_and_its_input():
    module, x = fused_act.Mish(), torch.randn(1000)
    expected = module(x)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(module, [x] * 100))


class Activated(torch.utils.data.Dataset):
    """The outputs and gradients of every case, computed by the worker that loads them."""

    def __len__(self):
        return len(ALL_CASES)

    def __getitem__(self, index):
        assert not torch.cuda.is_initialized()
        assert not torch.cuda._is_in_bad_fork()
        return (
            *forward_backward(ALL_CASES[index].function, torch.linspace(-8, 8, 33)),
            os.getpid(),
        )


@pytest.mark.full
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_equal_the_parent(method):
    loader = torch.utils.data.DataLoader(
        Activated(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120
    )
    loaded = list(loader)
    for case, (y, grad, process) in zip(ALL_CASES, loaded):
        expected = forward_backward(case.function, torch.linspace(-8, 8, 33))
        assert torch.equal(y, expected[0])
        assert torch.equal(grad, expected[1])
        assert process != os.getpid()
    assert len({process for _, _, process in loaded}) == 2


def compute(beta):
    return fused_act.Swish(beta)(torch.linspace(-8, 8, 33))


@pytest.mark.full
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_process_pools_equal_the_parent(method):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        for beta, y in zip((0.5, 1.0, -2.0), pool.map(compute, (0.5, 1.0, -2.0))):
            assert torch.equal(y, compute(beta))
