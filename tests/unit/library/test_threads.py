"""Calls from several threads at once, and after a fork."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import scalpel
from scalpel import reference

pytestmark = pytest.mark.xdist_group("threads")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Use several threads inside each call too, wherever the tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_topk_from_many_threads() -> None:
    inputs = [torch.randn(64, 300 + 7 * i) for i in range(8)]
    expected = [reference.topk_mask(x, 50) for x in inputs]

    def work(i: int) -> bool:
        x = inputs[i % 8]
        return np.array_equal(scalpel.topk_mask(x, 50).numpy(), expected[i % 8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_gradients_from_many_threads() -> None:
    def work(seed: int) -> bool:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        scalpel.keep_topk(x, 9).sum().backward()
        return torch.equal(x.grad.bool(), scalpel.topk_mask(x, 9))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(50)))


def test_one_state_from_many_threads() -> None:
    batches = torch.randn(64, 37, 24, dtype=torch.float64)
    state = scalpel.StreamingCovariance(24)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(state.update, batches))
    expected = reference.moments(batches)
    assert state.count == expected.rows
    np.testing.assert_allclose(state.covariance().numpy(), expected.covariance, atol=1e-12)


def test_crossed_merges_do_not_wait_for_each_other() -> None:
    a, b = (scalpel.StreamingCovariance(8).update(torch.randn(5, 8)) for _ in range(2))
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            for job in (pool.submit(a.merge, b), pool.submit(b.merge, a)):
                job.result(timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork() -> None:
    x = torch.randn(400, 500)  # large enough that the parent has started its threads
    expected = scalpel.topk_mask(x, 100).numpy()
    child = os.fork()
    if child == 0:
        try:
            ours = scalpel.topk_mask(x.numpy(), 100)
            os._exit(0 if np.array_equal(ours, expected) else 1)
        except BaseException:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, sys.platform
